"""A rank without libraries, for tests of ``batch.sh``: what it does is its argument.

It starts a helper, as real ranks do, which must not be signalled.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RANK, RESTARTS = os.environ["SLURM_PROCID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
HELPER = """
import signal, time
signal.signal(signal.SIGUSR1, lambda *_: print('helper got USR1', flush=True))
time.sleep(300)
"""


def say(text: str) -> None:
    print(f"rank {RANK}: {text}\n", end="", flush=True)


def save_when_told(folder: Path) -> None:
    """All ranks leave with 75 once any of them is told; after a restart they end well."""
    told: list[int] = []
    number = signal.Signals[f"SIG{os.environ.get('SAVE_SIGNAL', 'USR1')}"]
    signal.signal(number, lambda *_: told.append(1))
    helper = subprocess.Popen([sys.executable, "-c", HELPER])
    say(f"start {RESTARTS + 1}, MASTER_ADDR {os.environ['MASTER_ADDR']}")
    flag = folder / f"told-{os.environ['SLURM_JOB_ID']}"
    try:
        while not RESTARTS:
            if told and not flag.exists():
                say("told")
                flag.touch()
            if flag.exists():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(0.5)
                helper.kill()
                os._exit(75)
            time.sleep(0.05)
    finally:
        helper.kill()


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "save":
        save_when_told(folder)
    elif what == "deaf" and RESTARTS == 0:  # has no handler yet: the signal ends it
        say("start 1")
        time.sleep(300)
    elif what == "lost" and RESTARTS == 0:  # ends, as a rank does whose peer is gone
        say("start 1")
        while not (folder / "crashed").exists():
            time.sleep(0.05)
        sys.exit(4)
    elif what == "fail" and RANK == "1":
        time.sleep(0.5)
        sys.exit(3)
    elif what == "fail":
        time.sleep(300)
    elif what == "wait" and RESTARTS == 0:
        say("start 1")
        time.sleep(300)


if __name__ == "__main__":
    main()
