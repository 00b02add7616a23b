"""A process that has imported torch, Megatron and vLLM once, and forks the ranks of tests from itself.

``python -m tests.prefork`` reads jobs from stdin, one a line:
``{"module", "argv", "nproc", "env", "cwd", "stdout", "stderr"}``. It answers each by two lines: ``{"pids": [...]}``
when its ranks run, ``{"returncode": n}`` when they have ended, and ends with its stdin. A rank is a process of its own,
as if torchrun had started ``python -m module argv`` (rendezvous by the environment), but without the seconds of CPU
that the imports take.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

#: Ranks that are still there so long after another one failed are killed.
GRACE_S = 5.0


def warm_up() -> None:
    """Import what ranks need; nothing here may start a thread or draw a random number that a rank would share."""
    from tempo_megatron.imports import uncollected
    from tempo_megatron.loop import load_evaluation_libraries

    with uncollected():
        load_evaluation_libraries()
        import tempo_megatron.loop.em
        import tempo_megatron.loop.sft  # noqa: F401

    others = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    assert not others, f"a process with threads must not fork: {others}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank of one node; nothing for a single process, which starts without it."""
    if nproc == 1:
        return {}
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in places.items()}}


def be_rank(job: dict[str, Any], environment: dict[str, str]) -> int:
    """Run the job's module as ``__main__`` in this (forked) process; the exit status."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, number in ((os.devnull, 0), (job["stdout"], 1), (job["stderr"], 2)):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["cwd"])
    os.environ.update({**job["env"], **environment})
    sys.argv = [job["module"], *job["argv"]]
    try:
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(job: dict[str, Any]) -> list[int]:
    """Fork the job's ranks; their process ids in the order of ranks."""
    port, pids = free_port(), []
    for rank in range(job["nproc"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = be_rank(job, rank_environment(rank, job["nproc"], port))
                atexit._run_exitfuncs()
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)  # never back into the loop of the process that forks
        pids.append(pid)
    return pids


def wait(pids: list[int]) -> int:
    """0, or the status (negative: a signal) of the rank that failed first, upon which the others are ended."""
    running, failed, deadline = set(pids), 0, float("inf")
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if time.monotonic() > deadline:
                end(running, signal.SIGKILL)
            time.sleep(0.01)
            continue
        running.discard(pid)
        if (code := os.waitstatus_to_exitcode(status)) != 0 and failed == 0:
            failed, deadline = code, time.monotonic() + GRACE_S
            end(running, signal.SIGTERM)
    return failed


def end(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def main() -> None:
    faulthandler.enable()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    warm_up()
    answers.write(json.dumps({"ready": True}) + "\n")
    while line := sys.stdin.readline():  # not by iteration, which reads ahead
        pids = start(json.loads(line))
        answers.write(json.dumps({"pids": pids}) + "\n")
        answers.write(json.dumps({"returncode": wait(pids)}) + "\n")


if __name__ == "__main__":
    main()
