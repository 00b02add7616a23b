"""The ranks of one node, started and watched by ``train`` itself: no files, no restarts.

Where that is safe (``forked.may_fork``) they are forked from this process, after it has imported the libraries once
for all of them; otherwise each is a program of its own.

torchrun's agent does more (several nodes, restarts) and less: it cannot say which ranks it killed itself, waits half
a minute for a stopped one, dies of SIGUSR1, and leaves its ranks behind when it is killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tempo_megatron.cluster.board import BOARD, open_board, posted
from tempo_megatron.cluster.forked import Forked, fork_module, may_fork
from tempo_megatron.cluster.lifetime import EXIT_LOST_PEER, EXIT_STOPPED, LAUNCHER, STACK_SIGNALS, say, stop_message
from tempo_megatron.cluster.stop_request import asked_message
from tempo_megatron.errors import RunError

#: Seconds that ranks may take to end after a signal before they are killed.
SHUTDOWN_TIMEOUT_S = 8
#: Seconds between two looks at the ranks.
POLL_S = 0.05
#: Seconds that a rank has to print its stacks before the next one does: they write piece by piece.
STACK_S = 0.2

#: Descriptor of the socket on which rank 0 serves the store by which the ranks find each other.
STORE_SOCKET = "TEMPO_MEGATRON_STORE_SOCKET"

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes] | Forked
    sent: set[int] = field(default_factory=set)  # ending signals that it had from here
    board: int | None = None  # where it posts its phase

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def __str__(self) -> str:
        phase = posted(self.board, self.number) if self.board is not None else ""
        return f"rank {self.number} (host {socket.gethostname()}){f', in phase {phase},' if phase else ''}"

    def ended_by_itself(self) -> bool:
        """Whether its exit code is no mere consequence of what it was sent."""
        code = self.process.returncode
        return code not in (0, EXIT_LOST_PEER) and code not in {s for n in self.sent for s in (-n, 128 + n)}


class _Stopped(BaseException):
    """An ending signal came while there were no ranks yet."""


@dataclass
class _Inbox:
    """Signals that arrived, in order; ``handlers``: what was there before for each that may."""

    handlers: Mapping[signal.Signals, Any]
    received: deque[signal.Signals] = field(default_factory=deque)
    interrupts: bool = False  # an ending signal ends what runs here

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))
        if self.interrupts and number in _ENDING:
            self.interrupts = False
            raise _Stopped


def spawn_ranks(
    nproc: int,
    argv: Sequence[str],
    load_libraries: Callable[[], None] | None = None,
    save_signal: signal.Signals | None = None,
) -> int:
    """Run ``python -m tempo_megatron ARGV`` as ``nproc`` ranks of this node.

    The ranks inherit stdout, stderr and the environment (set ``rank_environment`` first).  When one fails the
    others are ended.  SIGINT, SIGTERM, SIGHUP and SIGQUIT end the ranks and are told here, SIGUSR1 and SIGUSR2 are
    passed on; those that a rank does not expect yet wait for it.  Ranks end with this process, also where it is killed
    (``lifetime.follow_launcher``).

    Args:
        load_libraries: imports what every rank needs; called here where the ranks can be forked, else by nobody. It
            must leave no thread behind and draw no random number.
        save_signal: asks the ranks to save and end, and is passed on to all of them; a second SIGTERM ends them.

    Returns:
        0; 75 where the ranks have saved and ended as they were asked to; the exit code of the rank that failed first;
        or 128 + n for a signal n (130: Ctrl-C, 143: SIGTERM).

    Raises:
        RunError: a rank could not be started.
    """
    killed_for_memory = oom_kills()
    with open_board() as board:
        ranks: list[_Rank] = []
        stop = _run(ranks, nproc, argv, board, load_libraries, save_signal)
        if stop is not None:
            say(stop_message(stop, argv[0]))
            return 128 + stop
        return first_cause(ranks, killed_for_memory, argv[0])


def _run(
    ranks: list[_Rank],
    nproc: int,
    argv: Sequence[str],
    board: int,
    load_libraries: Callable[[], None] | None,
    save_signal: signal.Signals | None,
) -> signal.Signals | None:
    """From the start of the ranks, which are put into ``ranks``, to the end of all; the signal that asked for it."""
    with _received_signals() as inbox:
        try:
            forks = load_libraries is not None and may_fork()
            if forks and load_libraries is not None:
                inbox.interrupts = save_signal is not signal.SIGTERM
                load_libraries()
                inbox.interrupts = False
                forks = may_fork()
            _start(ranks, nproc, argv, board, inbox if forks else None)
            return _watch(ranks, inbox.received, save_signal)
        except _Stopped:
            return inbox.received[-1]
        finally:
            _end(ranks, signal.SIGTERM)


def _start(ranks: list[_Rank], nproc: int, argv: Sequence[str], board: int, forked_with: _Inbox | None) -> None:
    # bound here and served by rank 0: no other program can take the port in between
    with socket.create_server(("127.0.0.1", 0), backlog=max(128, nproc)) as server, _held(STACK_SIGNALS):
        for number in range(nproc):
            environment = {
                "RANK": str(number),
                "LOCAL_RANK": str(number),
                "WORLD_SIZE": str(nproc),
                "LOCAL_WORLD_SIZE": str(nproc),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(server.getsockname()[1]),
                LAUNCHER: str(os.getpid()),
                BOARD: str(board),
            }
            if number == 0:
                environment[STORE_SOCKET] = str(server.fileno())
            try:
                process = _rank_process(argv, environment, server.fileno(), forked_with)
            except OSError as error:
                raise RunError(
                    f"launch: rank {number} of {nproc} could not be started: {error.strerror} (limits on processes, "
                    "files and memory: ulimit -a)"
                ) from None
            ranks.append(_Rank(number, process, board=board))


@contextmanager
def _held(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Processes that are started in the block have these signals wait until they expect them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _rank_process(
    argv: Sequence[str], environment: Mapping[str, str], store: int, forked_with: _Inbox | None
) -> subprocess.Popen[bytes] | Forked:
    """One rank; ``store`` is the descriptor that only rank 0 gets."""
    serves = STORE_SOCKET in environment
    if forked_with is not None:
        closed = () if serves else (store,)
        return fork_module("tempo_megatron", argv, environment, closed, forked_with.handlers)
    return subprocess.Popen(
        [sys.executable, "-m", "tempo_megatron", *argv],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        pass_fds=(int(environment[BOARD]), *((store,) if serves else ())),
        start_new_session=True,  # Ctrl-C comes from here alone; its helpers are one group with it
    )


def _watch(
    ranks: list[_Rank], received: deque[signal.Signals], save_signal: signal.Signals | None
) -> signal.Signals | None:
    """Until all ranks have ended well, one has failed (None), or a signal asks for the end (that signal)."""
    asked = False
    while [rank for rank in ranks if rank.is_alive]:  # asks every one of them
        while received:
            number = received.popleft()
            if number is save_signal and not asked:
                asked = True
                say(asked_message(number))
                for rank in ranks:
                    rank.process.send_signal(number)
            elif number in STACK_SIGNALS and number is not save_signal:
                for rank in ranks:
                    rank.process.send_signal(number)
                    time.sleep(STACK_S)
            elif number in _ENDING:
                _end(ranks, number)
                return number
        if any(rank.process.returncode not in (None, 0, EXIT_STOPPED) for rank in ranks):
            return None
        time.sleep(POLL_S)
    return None


def _end(ranks: list[_Rank], number: signal.Signals) -> None:
    """Ask the ranks that are left to end, and kill those that do not, with their helpers."""
    alive = [rank for rank in ranks if rank.is_alive]
    for rank in alive:
        rank.sent.add(number)
        rank.process.send_signal(number)
        rank.process.send_signal(signal.SIGCONT)  # one that is stopped gets the signal only then
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
    while (alive := [rank for rank in alive if rank.is_alive]) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for rank in alive:
        rank.sent.add(signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(rank.process.pid, signal.SIGKILL)
    for rank in alive:
        try:
            rank.process.wait(SHUTDOWN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            say(
                f"rank {rank.number} (process {rank.process.pid}) does not end even when killed: it hangs in the kernel"
            )


def first_cause(ranks: Sequence[_Rank], killed_for_memory: int | None, command: str) -> int:
    """The exit code that explains the others: ranks ended from here and ranks that lost a peer come last.

    A rank killed by a signal could tell nothing, so that is told here.

    Args:
        killed_for_memory: ``oom_kills`` when the ranks were started.
        command: that the ranks ran.
    """
    failed = [rank for rank in ranks if rank.process.returncode not in (0, None)]
    if not failed:
        return 0
    causes = [rank for rank in failed if rank.ended_by_itself()]
    lost_peer = [rank for rank in failed if rank.process.returncode == EXIT_LOST_PEER]
    stopped = [rank for rank in causes if rank.process.returncode == EXIT_STOPPED]
    rank = ([rank for rank in causes if rank not in stopped] or lost_peer or stopped or failed)[0]
    code = int(rank.process.returncode or 0)
    if code - 128 in _ENDING:  # a signal that did not come from here; a rank of this program leaves the word to it
        say(stop_message(signal.Signals(code - 128), command))
    if code >= 0:
        return code
    reason = _reason(signal.Signals(-code), killed_for_memory) if causes else ""
    say(f"error: {rank} was killed by {signal.Signals(-code).name}{reason}")
    return 128 - code


def _reason(number: signal.Signals, killed_for_memory: int | None) -> str:
    if number is not signal.SIGKILL:
        return ""
    now = oom_kills()
    if now is None or killed_for_memory is None:
        return "; out of memory?"
    if now > killed_for_memory:
        return ": the machine or its memory limit (cgroup) ran out of memory"
    return " from outside; memory did not run out"


def oom_kills(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How many processes of this one's control group were killed for lack of memory; None where nobody counts them.

    cgroup v2 (``memory.events``) and v1 (``memory.oom_control``): the kernel's cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            places = [root / path.lstrip("/") / "memory.events", root / "memory.events"]
        elif "memory" in controllers.split(","):
            folder = root / "memory"
            places = [folder / path.lstrip("/") / "memory.oom_control", folder / "memory.oom_control"]
        else:
            continue
        for place in places:  # the second: a container that sees its own group as the root
            if (count := _counter(place, "oom_kill")) is not None:
                return count
    return None


def _counter(file: Path, key: str) -> int | None:
    try:
        pairs: Mapping[str, str] = dict(line.split() for line in file.read_text().splitlines())
    except (OSError, ValueError):
        return None
    return int(pairs[key]) if key in pairs else None


@contextmanager
def _received_signals() -> Iterator[_Inbox]:
    """What arrives within the block; the handlers before come back after it. An ignored SIGHUP stays so."""
    before = {n: signal.getsignal(n) for n in (*_ENDING, *STACK_SIGNALS) if signal.getsignal(n) is not signal.SIG_IGN}
    inbox = _Inbox(before)
    for number in before:
        signal.signal(number, inbox.receive)
    try:
        yield inbox
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
