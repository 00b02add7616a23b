"""What a rank knows of the others, and how a line names them."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempo_megatron.cluster.board import posted_here

#: The phase of a rank that is done.
ENDED = "ended"
#: Ranks that a line names.
SHOWN = 3


@dataclass
class Peer:
    """What is known of another rank; seconds are counted while this process itself was running."""

    rank: int
    status: dict[str, Any] = field(default_factory=dict)
    silent_s: float = 0.0

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
        return f"rank {self.rank} (host {self.status.get('host', 'unknown')}), {self.phase}{_state(self)}"


def listed(peers: dict[int, Peer]) -> str:
    """The first few of them."""
    shown = [str(peer) for _, peer in sorted(peers.items())]
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")


def _state(peer: Peer) -> str:
    """What the kernel says of a process on this host."""
    if peer.status.get("host") != socket.gethostname():
        return ""
    try:
        state = Path(f"/proc/{peer.status['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return {"T": ", stopped by a signal (SIGSTOP)", "t": ", stopped by a debugger"}.get(state, "")
