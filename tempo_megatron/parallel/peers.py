"""What a rank knows of the others, and how a line names them."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempo_megatron.cluster.board import posted_here

#: The phase of a rank that is done.
ENDED = "ended"
#: Ranks that a line names.
SHOWN = 3
#: Signs of life in a row by which a clock is judged: one may have been read late, by a process that was stopped.
CLOCKS_READ = 3


@dataclass
class Peer:
    """What is known of another rank; seconds are counted while this process itself was running."""

    rank: int
    status: dict[str, Any] = field(default_factory=dict)
    silent_s: float = 0.0
    clocks: deque[float] = field(default_factory=lambda: deque(maxlen=CLOCKS_READ))

    def heard(self, status: dict[str, Any], clock: float) -> None:
        """A new status came, when this rank's clock was at ``clock``, s since the epoch."""
        self.status, self.silent_s = status, 0.0
        self.clocks.append(status["clock"] - clock)

    @property
    def clock_ahead_s(self) -> float:
        """At least by how much its clock is ahead of this rank's, negative if behind; 0 until that is known."""
        if len(self.clocks) < CLOCKS_READ:
            return 0.0
        return max(0.0, min(self.clocks)) + min(0.0, max(self.clocks))

    @property
    def has_ended(self) -> bool:
        return self.status.get("phase") == ENDED

    @property
    def phase(self) -> str:
        told, since = self.status.get("phase", "start"), self.status.get("in_phase_s", 0.0) + self.silent_s
        posted = posted_here(self.rank)
        if posted not in ("", told) and not self.has_ended:  # entered after the last sign of life
            told, since = posted, self.silent_s
        return f"in phase {told} for {since:.0f} s"

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}), {self.phase}{_state(self)}"

    @property
    def host(self) -> str:
        return str(self.status.get("host", "unknown"))


def listed(peers: dict[int, Peer]) -> str:
    """The first few of them."""
    shown = [str(peer) for _, peer in sorted(peers.items())]
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")


def wrong_clocks(me: Peer, others: Collection[Peer], limit_s: float) -> str | None:
    """Whose clock differs from this rank's by more than ``limit_s``, and how much; this rank's own where most do."""
    off = sorted((peer for peer in others if abs(peer.clock_ahead_s) > limit_s and not peer.has_ended), key=_by_clock)
    if not off:
        return None
    worst, seen = off[0], sum(len(peer.clocks) == CLOCKS_READ for peer in others)
    if 2 * len(off) > max(seen, 2):
        return f"the clock of {me} is {_ahead(-worst.clock_ahead_s)} that of {worst} and of {len(off) - 1} more"
    also = f" (and {len(off) - 1} more differ)" if len(off) > 1 else ""
    return f"the clock of {worst} is {_ahead(worst.clock_ahead_s)} that of rank {me.rank} (host {me.host}){also}"


def _by_clock(peer: Peer) -> tuple[float, int]:
    return -abs(peer.clock_ahead_s), peer.rank


def _ahead(seconds: float) -> str:
    return f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'}"


def _state(peer: Peer) -> str:
    """What the kernel says of a process on this host."""
    if peer.status.get("host") != socket.gethostname():
        return ""
    try:
        state = Path(f"/proc/{peer.status['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return {"T": ", stopped by a signal (SIGSTOP)", "t": ", stopped by a debugger"}.get(state, "")
