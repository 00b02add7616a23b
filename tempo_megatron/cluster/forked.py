"""A rank forked from its launcher, which has imported the libraries for all of them."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

_POLL_S = 0.05
#: Threads by the kernel's name that a fork does not harm: the one of pyarrow's allocator holds no lock across a fork,
#: and the child starts its own (jemalloc's background_thread.c, background_thread_prefork0 and _postfork_child).
_HARMLESS = {"jemalloc_bg_thd"}


def may_fork(tasks: Path = Path("/proc/self/task")) -> bool:
    """Whether a child of this process can go on by itself: it has no other thread that counts, and no GPU to share.

    A thread that is not copied may hold a lock for ever. Importing torch and vLLM with CUDA may start the driver,
    which does not survive a fork; torch's CPU build has none.
    """
    try:
        names = [(task / "comm").read_text().strip() for task in tasks.iterdir()]
        others = [name for name in names if name not in _HARMLESS]
        return metadata.version("torch").endswith("+cpu") and len(others) == 1
    except (metadata.PackageNotFoundError, OSError):
        return False


class Forked:
    """A child process of this one, asked and told as a ``subprocess.Popen`` is."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, -n for a signal n; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid != 0:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # its number may be another process's once it was waited for
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(["rank"], timeout)
            time.sleep(_POLL_S)
        return code


def fork_module(
    module: str,
    argv: Sequence[str],
    environment: Mapping[str, str],
    closed: Sequence[int],
    handlers: Mapping[signal.Signals, Any],
) -> Forked:
    """``python -m MODULE ARGV`` in a fork of this process: a session of its own, no stdin, the given environment.

    Args:
        closed: descriptors that it does not get.
        handlers: signal -> what it does there.

    Raises:
        OSError: no process can be had.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)  # one that comes before its handler is there waits
    try:
        pid = os.fork()
        if pid == 0:
            _be(module, argv, environment, closed, handlers, held)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    return Forked(pid)


def _be(
    module: str,
    argv: Sequence[str],
    environment: Mapping[str, str],
    closed: Sequence[int],
    handlers: Mapping[signal.Signals, Any],
    held: set[Any],
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for descriptor in (nothing, *closed):
            os.close(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        os.environ.update(environment)
        sys.argv = [module, *argv]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)  # never back into the launcher's own code
