"""Ranks watch each other and themselves: one that is stopped, hangs, or gets nowhere ends the job with its name.

So does one whose host's clock is far from the others': logs, leases of files and Slurm's credentials go by clocks.

Every rank keeps a short status in the job's store (torch's TCPStore): a counter that shows life, its phase, how long it
has made no progress, and whether its main thread waits for others. Rank 0 looks at all, the others at rank 0; each
looks at its own progress (``cluster/pulse.py``). A rank that waits for others is excused: those have to get on.

Before the job ends, all ranks that still can write their stacks: an order in the store tells them. A request to a store
whose host is stopped may never return, so that one thread talks to it and another one judges.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, Store

from tempo_megatron.cluster.lifetime import EXIT_LOST_PEER, leave
from tempo_megatron.cluster.pulse import last_ping
from tempo_megatron.config.job import WatchdogConfig
from tempo_megatron.parallel import stacks
from tempo_megatron.parallel.peers import ENDED, Peer, listed, wrong_clocks

#: Longest time between two statuses, seconds; a quarter of the time limit where that is less.
PERIOD_S = 5.0
#: Seconds by which ranks after the first teller hold back: the first that leaves ends the others.
FOLLOWER_GRACE_S = 5.0
#: Seconds that the last look at all ranks may take.
LAST_LOOK_S = 3.0
#: Seconds for which stacks are waited for, beside two periods; and after which a rank that was told of the end leaves
#: by itself, should nobody end it.
STACKS_S, TOLD_S = 3.0, 45.0
#: Seconds that the farewells of a rank that leaves may take; between two looks at who has written.
FAREWELL_S, POLL_S = 10.0, 0.05

#: Innermost Python frames of a thread that waits for other ranks.
WAITING_FILES = (
    "torch/distributed/distributed_c10d.py",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "megatron/core/distributed/param_and_grad_buffer.py",
    "tempo_megatron/parallel/meeting.py",
)

_ORDER, _WRITTEN = "watchdog/order", "watchdog/written"


class Watchdog:
    """Started by every rank, once all of them have joined.

    Args:
        store: of the job; a connection of its own is made. None in a world of one.
        timeout_s: longest silence of a peer, seconds.
        deadlines: longest times without progress; None: this rank does not look at its own.
        folder: where stacks are written, agreed by all ranks; None: nowhere.
        end: called with the one line and the exit code; for tests.
        clock: of this host, s since the epoch; for tests.
    """

    def __init__(
        self,
        store: Store | None,
        rank: int,
        world_size: int,
        timeout_s: float,
        *,
        deadlines: WatchdogConfig | None = None,
        folder: Path | None = None,
        end: Callable[[str | None, int], None] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._store, self._rank, self._world_size, self._timeout_s = store, rank, world_size, timeout_s
        self._deadlines = deadlines
        self._folder = folder
        self._end, self._clock = end or _leave_for_sure, clock or time.time
        self._period_s = min(PERIOD_S, timeout_s / 4, PERIOD_S if deadlines is None else deadlines.shortest_s / 4)
        self._phase, self._first, self._phase_began = "start", True, time.monotonic()
        self._still_s, self._waits_s = 0.0, 0.0  # without progress: while it worked, while it waited for others
        self._main = threading.main_thread().ident
        self._memory_file = stacks.open_for_others() if folder is not None else -1
        self._beats, self._started = 0, False
        self._lock = threading.Lock()
        self._peers = {r: Peer(r) for r in range(world_size) if r != rank}
        self._look_at_all, self._looked = threading.Event(), threading.Event()
        self._is_alone = False  # the store has ended
        self._ordered, self._answered = threading.Event(), threading.Event()  # stacks, by this rank
        self._silent: dict[int, dict[str, Any]] = {}  # ranks that were silent then
        self._is_first, self._written = True, 0  # of the ranks that ordered; how many have obeyed
        self._is_told = False  # by another rank
        self._stop, self._wake = threading.Event(), threading.Event()

    def announce(self) -> None:
        """Put the first status where peers will look; before the ranks meet."""
        if self._store is not None:
            self._store.set(_key(self._rank), json.dumps(self._status()))
            if self._rank == 0:
                self._store.set(_ORDER, "")

    def start(self) -> None:
        self._started = True
        for target in (self._exchange, self._judge) if self._store is not None else (self._judge,):
            threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True).start()

    def enter(self, phase: str, *, first: bool = True) -> None:
        """This rank's main thread begins something; a sign of progress.

        Args:
            phase: its name, perhaps with a detail behind it.
            first: it comes for the first time, and may have to load, compile or warm up.
        """
        self._phase, self._first, self._phase_began = phase, first, time.monotonic()
        self._wake.set()

    def stop(self) -> None:
        """This rank is done: its silence from now on means nothing."""
        self.enter(ENDED)
        self._stop.set()
        self._wake.set()
        if self._started and self._store is not None:
            self._looked.wait(LAST_LOOK_S)

    def who_is_missing(self) -> str:
        """After a collective that took too long: the ranks that did not take part, or what all were at.

        All ranks have written their stacks then, as far as they can.
        """
        self._look_around()
        with self._lock:
            absent = {r: p for r, p in self._peers.items() if self._is_silent(p)}
            absent = absent or {r: p for r, p in self._peers.items() if not p.status.get("waits", False)}
            missing = absent or dict(self._peers)
        return listed(missing) + self._gather_stacks(missing)

    # ---------------------------------------------------------------- the thread that talks

    def _exchange(self) -> None:
        store = self._store.clone()  # type: ignore[union-attr]  # absent from torch's stubs
        store.set_timeout(timedelta(seconds=self._period_s))
        next_look = 0.0
        while True:
            done = self._stop.is_set()
            try:
                store.set(_key(self._rank), json.dumps(self._status()))
                asked = self._look_at_all.is_set() or self._ordered.is_set()
                if not done and (asked or time.monotonic() >= next_look):  # else it only tells its new phase
                    next_look = time.monotonic() + self._period_s
                    self._look(store)
                    self._pass_orders(store)
            except DistStoreError:  # no answer in time: the next round asks again, and the other thread counts
                pass
            except DistNetworkError:  # the store's host has ended: its launcher tells of that, if it is no good end
                self._is_alone = done = True
            if done:
                self._looked.set()
                return
            self._wake.wait(POLL_S if self._ordered.is_set() else max(POLL_S, next_look - time.monotonic()))
            self._wake.clear()

    def _look(self, store: Store) -> None:
        everyone = self._look_at_all.is_set()
        ranks = list(self._peers) if everyone or self._rank == 0 else [0]
        found = [json.loads(value) for value in store.multi_get([_key(rank) for rank in ranks])]
        with self._lock:
            for rank, status in zip(ranks, found, strict=True):
                peer = self._peers[rank]
                if status["beat"] != peer.status.get("beat"):
                    peer.heard(status, self._clock())
        if everyone:
            self._look_at_all.clear()
            self._looked.set()

    def _look_around(self) -> None:
        """Have the statuses of all ranks brought; as far as they come."""
        if self._store is not None:
            self._looked.clear()
            self._look_at_all.set()
            self._wake.set()
            self._looked.wait(LAST_LOOK_S)

    def _pass_orders(self, store: Store) -> None:
        """To write stacks, for the job ends: from this rank or to it. The first order counts."""
        if self._ordered.is_set():
            if not self._answered.is_set():
                mine = json.dumps({"by": self._rank, "silent": self._silent})
                self._is_first = store.compare_set(_ORDER, "", mine).decode() == mine
                self._answered.set()
            self._written = store.add(_WRITTEN, 0)
        elif not self._is_told and (order := store.get(_ORDER).decode()):
            self._is_told = True
            threading.Thread(target=self._obey, args=(json.loads(order),), daemon=True).start()

    def _obey(self, order: dict[str, Any]) -> None:
        self._write_stacks(order["silent"])
        with suppress(DistStoreError, DistNetworkError):
            self._store.clone().add(_WRITTEN, 1)  # type: ignore[union-attr]
        time.sleep(TOLD_S)
        self._end(None, EXIT_LOST_PEER)

    # ---------------------------------------------------------------- the thread that judges

    def _judge(self) -> None:
        before, seen = time.monotonic(), (last_ping(), self._phase_began)
        while not self._stop.wait(self._period_s / 2):
            now = time.monotonic()
            gap = min(now - before, self._period_s)  # not the time in which this process was stopped itself
            before = now
            signs, waits = (last_ping(), self._phase_began), self._waits_for_others()
            self._still_s = 0.0 if signs != seen or waits else self._still_s + gap
            self._waits_s = self._waits_s + gap if signs == seen and waits else 0.0
            seen = signs
            silent = self._count_silence(gap)
            if silent:
                if self._rank > 1:  # rank 1 tells of rank 0
                    time.sleep(FOLLOWER_GRACE_S)
                told = f"no sign of life from {listed(silent)}; launch.timeout_s: {self._timeout_s:g}"
                return self._end_job(told, silent)
            if self._rank == 0 and self._all_wait():
                told = f"all ranks wait for each other: {listed({0: self._as_peer(), **self._peers})}"
                return self._end_job(f"{told}; launch.timeout_s: {self._timeout_s:g}", {})
            if self._rank == 0 and (wrong := self._wrong_clocks()):
                return self._end_job(wrong, {})
            if self._deadlines is not None:
                deadline, key = self._deadlines.deadline(self._phase.split()[0], first=self._first)
                if self._still_s > deadline:
                    return self._end_job(f"{self._describe_stillness()}; {key}: {deadline}", {})
        return None

    def _count_silence(self, gap: float) -> dict[int, Peer]:
        """Those of the watched peers that have been silent for too long, ``gap`` seconds after the last look."""
        watched = {} if self._is_alone else self._peers if self._rank == 0 else {0: self._peers[0]}
        with self._lock:
            for peer in watched.values():
                peer.silent_s += gap
            return {r: p for r, p in watched.items() if p.silent_s > self._timeout_s and not p.has_ended}

    def _all_wait(self) -> bool:
        """No rank works, and none has got on for longer than a collective may take: they wait in different places."""
        with self._lock:
            waits = [self._waits_s, *(p.status.get("waits_s", 0.0) for p in self._peers.values())]
        return self._store is not None and min(waits) > self._timeout_s

    def _wrong_clocks(self) -> str | None:
        if self._deadlines is None:
            return None
        limit = self._deadlines.clock_s
        with self._lock:
            told = wrong_clocks(self._as_peer(), self._peers.values(), limit)
        return told and f"{told}; let all hosts follow one time server; watchdog.clock_s: {limit}"

    def _as_peer(self) -> Peer:
        return Peer(self._rank, self._status())

    def _describe_stillness(self) -> str:
        """This rank's, and that of others which have stood still for about as long: who holds up whom is not known."""
        still_s = self._still_s
        began = datetime.datetime.now() - timedelta(seconds=still_s)
        me = f"rank {self._rank} (host {socket.gethostname()}), {self._in_phase()}"
        self._look_around()
        with self._lock:
            alike = {r: p for r, p in self._peers.items() if p.status.get("still_s", 0.0) > still_s / 2}
        also = f"; nor has {listed(alike)}" if alike else ""
        return f"{me}, has made no progress for {still_s:.0f} s (since {began:%H:%M:%S}){also}"

    def _end_job(self, told: str, culprits: dict[int, Peer]) -> None:
        where = self._gather_stacks(culprits)
        if not self._is_first:
            time.sleep(TOLD_S)  # another rank tells
        self._end(f"error: {told}{where}", EXIT_LOST_PEER)

    # ---------------------------------------------------------------- stacks

    def _gather_stacks(self, culprits: dict[int, Peer]) -> str:
        """Have every rank write its stacks, and wait for that; what a line says of where they are."""
        if self._folder is None:
            return ""
        with self._lock:
            self._silent = {r: {**p.status, "at": p.phase} for r, p in culprits.items() if self._is_silent(p)}
            others = sum(not p.has_ended for r, p in self._peers.items() if r not in self._silent)
        self._ordered.set()
        self._wake.set()
        problem: list[str | None] = []  # from a thread, for the file system may be what hangs
        threading.Thread(target=lambda: problem.append(self._write_stacks(self._silent)), daemon=True).start()
        deadline = time.monotonic() + 2 * self._period_s + STACKS_S
        while time.monotonic() < deadline:
            all_have = self._store is None or self._is_alone or not self._is_first or self._written >= others
            if problem and all_have:
                break
            time.sleep(POLL_S)
        hindered = problem[0] if problem else "it does not answer"
        return f"; stacks: {self._folder}" if hindered is None else f"; no stacks: {self._folder}: {hindered}"

    def _write_stacks(self, silent: dict[Any, dict[str, Any]]) -> str | None:
        """This rank's own, and what can be had of silent ones on this host; what hindered it."""
        if self._folder is None:
            return None
        try:
            stacks.write_own(self._folder, self._rank, self._in_phase())
            for rank, status in silent.items():
                if status.get("host") == socket.gethostname():
                    where = (self._folder, int(rank), status["pid"], status["memory_file"])
                    stacks.write_of_other(*where, status["at"])
        except OSError as error:
            return error.strerror or str(error)
        return None

    # ---------------------------------------------------------------- this rank

    def _is_silent(self, peer: Peer) -> bool:
        return peer.silent_s > 2 * self._period_s

    def _in_phase(self) -> str:
        return f"in phase {self._phase} for {time.monotonic() - self._phase_began:.0f} s"

    def _status(self) -> dict[str, Any]:
        self._beats += 1
        return {
            "beat": self._beats,
            "clock": self._clock(),
            "phase": self._phase,
            "in_phase_s": round(time.monotonic() - self._phase_began, 1),
            "still_s": round(self._still_s, 1),
            "waits_s": round(self._waits_s, 1),
            "waits": self._waits_for_others(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "memory_file": self._memory_file,
        }

    def _waits_for_others(self) -> bool:
        frame = sys._current_frames().get(self._main or 0)
        return self._store is not None and frame is not None and frame.f_code.co_filename.endswith(WAITING_FILES)


def _leave_for_sure(text: str | None, code: int) -> None:
    """What is to be put in order first may hang too."""
    timer = threading.Timer(FAREWELL_S, os._exit, [code])
    timer.daemon = True
    timer.start()
    leave(text, code)


def _key(rank: int) -> str:
    return f"watchdog/{rank}"
