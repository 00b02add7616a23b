"""How the processes of a run end: with their launcher, upon a signal, and by which exit code.

No torch here: the launcher and the verifier's workers are light.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NoReturn

#: A rank ends with this when a peer is gone or does not answer: never the cause, only the consequence.
EXIT_LOST_PEER = 4

#: A run that was asked to end, has saved, and goes on when it is started again (sysexits.h: EX_TEMPFAIL).
EXIT_STOPPED = 75

#: Ends a run; SIGINT is Python's own.
_ENDING = (signal.SIGTERM, signal.SIGHUP)
#: Make a rank print the stack of each of its threads, but for the one by which it is asked to save and end.
STACK_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)

#: What is true of a command that was stopped, and can be done about it.
AFTER_A_STOP = {
    "train": "what was saved is complete, go on with resume=auto",
    "evaluate": "an evaluation has nothing to go on from, start it again",
    "demo": "the same command goes on with what is not finished",
    "convert": "the target was not written",
}

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
#: Process id of the program of this package that started this one: the launcher of a rank, the demo of a stage.
LAUNCHER = "TEMPO_MEGATRON_LAUNCHER"

_farewells: list[Callable[[], None]] = []
_reapers: list[subprocess.Popen[bytes]] = []  # kept: their pipes are open as long as this process lives
_actions: dict[int, Callable[[signal.Signals], None]] = {}  # of the thread that listens
_listens = False


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel send this process ``number`` when its parent ends, however it ends.

    Args:
        parent: the parent's process id; where it is gone already, this process ends here.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def follow_launcher(is_rank: bool) -> None:
    """End with the program that started this one, where that is known.

    Ranks under srun are left alone: slurmstepd ends all processes of a step, and forks them from a thread, whose end
    the kernel takes for the parent's.
    """
    if LAUNCHER in os.environ:
        die_with_parent(int(os.environ[LAUNCHER]), signal.SIGKILL if is_rank else signal.SIGTERM)
    elif is_rank and "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's agent
        die_with_parent(os.getppid())


def is_spawned() -> bool:
    """Whether this program itself started this rank: its launcher tells of signals."""
    return LAUNCHER in os.environ and "RANK" in os.environ


def print_stacks_on_signal(numbers: Iterable[signal.Signals] = STACK_SIGNALS) -> None:
    """SIGUSR1 and SIGUSR2 print stacks and end nothing."""
    for number in numbers:
        _actions.pop(number, None)
        faulthandler.register(number, file=2, all_threads=True)  # the descriptor: sys.stderr may be replaced
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


@contextlib.contextmanager
def at_termination(farewell: Callable[[], None]) -> Iterator[None]:
    """Call ``farewell`` when the process ends within the block by ``leave``, as upon SIGTERM or SIGHUP."""
    _farewells.append(farewell)
    try:
        yield
    finally:
        _farewells.remove(farewell)


def on_signal(number: signal.Signals, action: Callable[[signal.Signals], None]) -> None:
    """Let a thread call ``action`` whenever signal ``number`` comes; from the main thread.

    A thread does it at once: the main thread may be inside a collective for minutes, where no handler of Python's runs.
    """
    _listen()
    _actions[number] = action
    faulthandler.unregister(number)
    signal.signal(number, lambda *_: None)  # the wake-up alone counts
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


def _listen() -> None:
    global _listens
    if _listens:
        return
    _listens = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        while True:
            number = os.read(reader, 1)[0]
            if (action := _actions.get(number)) is not None:
                action(signal.Signals(number))

    threading.Thread(target=wait, name="signals", daemon=True).start()


def end_on_signals(last_words: Callable[[signal.Signals], str | None]) -> None:
    """Let SIGTERM and SIGHUP end this process at once, after its farewells, with exit code 128 + n.

    A SIGHUP that is ignored (nohup) stays so.  Calling it again changes nothing.

    Args:
        last_words: signal -> what to write to stderr, if anything.
    """
    for number in _ENDING:
        if number not in _actions and signal.getsignal(number) is not signal.SIG_IGN:
            on_signal(number, partial(_end, last_words))


def _end(last_words: Callable[[signal.Signals], str | None], number: signal.Signals) -> None:
    leave(last_words(number), 128 + number)


def leave(text: str | None, code: int) -> NoReturn:
    """End this process now from any thread, with a line to stderr and its farewells."""
    if text is not None:
        say(text)
    for farewell in list(_farewells):
        farewell()
    os._exit(code)


def use_own_temporary_folder() -> None:
    """Let everything in this process, and what it starts, use a temporary folder that goes when the process ends.

    Libraries leave folders and sockets behind when a process is killed, or leaves without Python's farewells as ranks
    do.  A shell outside the process's group waits for the end of a pipe to it.  Compiled kernels stay where they were.
    Calling it again changes nothing.
    """
    if _reapers:
        return
    before = tempfile.gettempdir()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(before, f"torchinductor_{os.getuid()}"))
    folder = tempfile.mkdtemp(prefix="tempo-")  # short: sockets in it have 107 bytes for their path
    _reapers.append(
        subprocess.Popen(
            ["sh", "-c", 'read _; exec rm -rf -- "$1"', "sh", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    )
    os.environ["TMPDIR"] = tempfile.tempdir = folder


def say(text: str) -> None:
    """A line to stderr in one write, so that lines of several ranks do not mix."""
    with contextlib.suppress(OSError):  # the reader of stderr may be gone
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def stop_message(number: signal.Signals, command: str | None) -> str:
    what = "interrupted" if number is signal.SIGINT else f"stopped by {number.name}"
    remedy = AFTER_A_STOP.get(command or "")
    return f"{what}; {remedy}" if remedy else what
