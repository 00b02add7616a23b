"""What test_launching.py has its forked ranks do: ``tell``, ``fail`` or ``hang``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

RANK = os.environ.get("RANK")


def waits_for_ever() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    written = Path(sys.argv[2], f"{RANK}.new")
    written.write_text(f"{os.getpid()} {child.pid}")
    written.rename(written.with_suffix(""))
    time.sleep(600)


if __name__ == "__main__":
    if sys.argv[1] == "tell":
        imported = "torch" if "torch" in sys.modules else "nothing"
        text = f"rank {RANK}/{os.environ.get('WORLD_SIZE')} {os.environ['COLOR']} {imported}\n"
        os.write(1, text.encode())  # in one piece: the other rank writes to the same file
    elif sys.argv[1] == "hang":
        waits_for_ever()
    elif RANK == "1":
        print("rank 1 says why", file=sys.stderr)
        sys.exit(5)
    else:
        time.sleep(600)
