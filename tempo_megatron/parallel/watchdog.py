"""Ranks watch each other: one that is stopped, or hangs while the others wait, ends the job with its name.

Every rank keeps a short status in the job's store (torch's TCPStore): a counter that shows life, its phase, and
whether its main thread waits for others.  Rank 0 looks at all, the others at rank 0.  A request to a store whose host
is stopped may never return, so that one thread talks to it and another one judges.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, Store

from tempo_megatron.cluster.lifetime import EXIT_LOST_PEER, leave

#: Longest time between two statuses, seconds; a quarter of the time limit where that is less.
PERIOD_S = 5.0
#: Seconds by which ranks after the first teller hold back: the first that leaves ends the others.
FOLLOWER_GRACE_S = 5.0
#: Seconds that the last look at all ranks may take.
LAST_LOOK_S = 3.0

#: Innermost Python frames of a thread that waits for other ranks.
WAITING_FILES = (
    "torch/distributed/distributed_c10d.py",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "megatron/core/distributed/param_and_grad_buffer.py",
)

_ENDED = "ended"


@dataclass
class Peer:
    """What is known of another rank; seconds are counted while this process itself was running."""

    status: dict[str, Any] = field(default_factory=dict)
    silent_s: float = 0.0

    @property
    def has_ended(self) -> bool:
        return self.status.get("phase") == _ENDED

    def describe(self, rank: int) -> str:
        phase = self.status.get("phase", "start")
        since = self.status.get("in_phase_s", 0.0) + self.silent_s
        return f"rank {rank} (host {self.status.get('host', 'unknown')}), in phase {phase} for {since:.0f} s"


class Watchdog:
    """Started by every rank of a job of several, once all of them have joined.

    Args:
        store: of the job; a connection of its own is made.
        timeout_s: longest silence of a peer, seconds.
        end: called with the one line and the exit code; for tests.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_s: float,
        end: Callable[[str, int], None] | None = None,
    ) -> None:
        self._store, self._rank, self._world_size, self._timeout_s = store, rank, world_size, timeout_s
        self._end = end or leave
        self._period_s = min(PERIOD_S, timeout_s / 4)
        self._phase, self._phase_began = "start", time.monotonic()
        self._main = threading.main_thread().ident
        self._beats, self._started = 0, False
        self._lock = threading.Lock()
        self._peers = {r: Peer() for r in range(world_size) if r != rank}
        self._look_at_all, self._looked = threading.Event(), threading.Event()
        self._stop, self._wake = threading.Event(), threading.Event()

    def announce(self) -> None:
        """Put the first status where peers will look; before the ranks meet."""
        self._store.set(_key(self._rank), json.dumps(self._status()))

    def start(self) -> None:
        self._started = True
        for target in (self._exchange, self._judge):
            threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True).start()

    def enter(self, phase: str) -> None:
        """This rank's main thread begins something; a sign of progress."""
        self._phase, self._phase_began = phase, time.monotonic()

    def stop(self) -> None:
        """This rank is done: its silence from now on means nothing."""
        self.enter(_ENDED)
        self._stop.set()
        self._wake.set()
        if self._started:
            self._looked.wait(LAST_LOOK_S)

    def who_is_missing(self) -> str:
        """After a collective that took too long: the ranks that did not take part, or what all were at."""
        self._looked.clear()
        self._look_at_all.set()
        self._wake.set()
        self._looked.wait(LAST_LOOK_S)
        with self._lock:
            absent = {r: p for r, p in self._peers.items() if p.silent_s > 2 * self._period_s}
            absent = absent or {r: p for r, p in self._peers.items() if not p.status.get("waits", False)}
            return _listed(absent or self._peers)

    # ---------------------------------------------------------------- threads

    def _exchange(self) -> None:
        store = self._store.clone()  # type: ignore[attr-defined]  # absent from torch's stubs
        store.set_timeout(timedelta(seconds=self._period_s))
        while True:
            done = self._stop.is_set()
            try:
                store.set(_key(self._rank), json.dumps(self._status()))
                if not done:
                    self._look(store)
            except DistStoreError:  # no answer in time: the next round asks again, and the other thread counts
                pass
            except DistNetworkError:  # the store's host has ended: its launcher tells of that, if it is no good end
                self._stop.set()
                done = True
            if done:
                self._looked.set()
                return
            self._wake.wait(self._period_s)
            self._wake.clear()

    def _look(self, store: Store) -> None:
        everyone = self._look_at_all.is_set()
        ranks = list(self._peers) if everyone or self._rank == 0 else [0]
        found = [json.loads(value) for value in store.multi_get([_key(rank) for rank in ranks])]
        with self._lock:
            for rank, status in zip(ranks, found, strict=True):
                peer = self._peers[rank]
                if status["beat"] != peer.status.get("beat"):
                    peer.status, peer.silent_s = status, 0.0
        if everyone:
            self._look_at_all.clear()
            self._looked.set()

    def _judge(self) -> None:
        before = time.monotonic()
        watched = self._peers if self._rank == 0 else {0: self._peers[0]}
        while not self._stop.wait(self._period_s / 2):
            now = time.monotonic()
            gap = min(now - before, self._period_s)  # not the time in which this process was stopped itself
            before = now
            with self._lock:
                for peer in watched.values():
                    peer.silent_s += gap
                silent = {r: p for r, p in watched.items() if p.silent_s > self._timeout_s and not p.has_ended}
            if silent:
                if self._rank > 1:  # rank 1 tells of rank 0
                    time.sleep(FOLLOWER_GRACE_S)
                limit = f"launch.timeout_s: {self._timeout_s:g}"
                self._end(f"error: no sign of life from {_listed(silent)}; {limit}", EXIT_LOST_PEER)
                return

    def _status(self) -> dict[str, Any]:
        self._beats += 1
        return {
            "beat": self._beats,
            "phase": self._phase,
            "in_phase_s": round(time.monotonic() - self._phase_began, 1),
            "waits": self._waits_for_others(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def _waits_for_others(self) -> bool:
        frame = sys._current_frames().get(self._main or 0)
        return frame is not None and frame.f_code.co_filename.endswith(WAITING_FILES)


def _key(rank: int) -> str:
    return f"watchdog/{rank}"


def _listed(peers: dict[int, Peer]) -> str:
    shown = [f"{peer.describe(rank)}{_state(peer)}" for rank, peer in sorted(peers.items())]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _state(peer: Peer) -> str:
    """What the kernel says of a process on this host."""
    if peer.status.get("host") != socket.gethostname():
        return ""
    try:
        state = Path(f"/proc/{peer.status['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return {"T": ", stopped by a signal (SIGSTOP)", "t": ", stopped by a debugger"}.get(state, "")
