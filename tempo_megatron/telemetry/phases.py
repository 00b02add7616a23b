"""Seconds, peak memory and tokens of each phase of a step."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

GIB = 1 << 30
#: The phase in which parts of the job leave the device and come back.
MOVE = "move"


class Residency(Protocol):
    """What is where; see ``loop.residency``."""

    def has_to_move(self, phase: str) -> bool: ...
    def enter(self, phase: str) -> None: ...
    def resident_bytes(self) -> dict[str, int]: ...


class PhaseLedger:
    """Books a step's time, peak memory and tokens by phase.

    ``with ledger.phase("rollout"): ...`` may come several times in a step and adds up; a phase inside
    another one stops the outer one's clock, so that the phases of a step never count a second twice.

    Memory is this process's: on CUDA the most that torch had allocated, on CPU the largest resident set
    (the kernel's high-water mark, set back at the phase's start where that is permitted; where it is not,
    the mark since the process began).

    Args:
        on_phase: called with the name, and the detail where there is one, whenever another phase becomes current.

    Attributes:
        residency: where one is set, it brings what a phase needs before that begins, in a phase of its own (``move``).
    """

    def __init__(self, on_phase: Callable[[str], None] | None = None) -> None:
        self._on_phase = on_phase
        self.residency: Residency | None = None
        self._memory = _CudaPeak() if torch.cuda.is_available() else _HostPeak()
        self._stack: list[tuple[str, str]] = []  # name, and what to show
        self._completed: set[str] = set()  # of the whole run, by what is shown
        self._seconds: dict[str, float] = {}
        self._peak_bytes: dict[str, int] = {}
        self._resident: dict[str, dict[str, int]] = {}  # of the whole run: phase -> part -> bytes
        self._highest_in: dict[str, int] = {}  # of the whole run
        self._tokens: dict[str, int] = {}
        self._highest = 0
        self._segment_began = self._step_began = time.perf_counter()

    @property
    def current(self) -> str | None:
        """The innermost open phase."""
        return self._stack[-1][0] if self._stack else None

    @property
    def is_first(self) -> bool:
        """Whether the innermost open phase comes for the first time: none like it (and its detail) is through yet."""
        return bool(self._stack) and self._stack[-1][1] not in self._completed

    @property
    def peak_gib(self) -> float:
        """The most of all phases since the ledger was made, whatever was collected."""
        return self._highest / GIB

    @contextmanager
    def phase(self, name: str, detail: str = "") -> Iterator[None]:
        """Book what is done inside to ``name``; ``detail`` is only shown (``"load"``, ``"vLLM"``)."""
        self._move_for(name)
        self._close_segment()
        self._stack.append((name, f"{name} {detail}".rstrip()))
        self._open_segment()
        try:
            yield
        finally:
            self._close_segment()
            self._completed.add(self._stack.pop()[1])
            self._open_segment()
        if self._stack and name != MOVE:
            self._move_for(self._stack[-1][0])  # the outer one goes on

    def _move_for(self, name: str) -> None:
        if self.residency is not None and self.residency.has_to_move(name):
            with self.phase(MOVE, f"for {name}"):
                self.residency.enter(name)

    def add_tokens(self, phase: str, count: int) -> None:
        """Count ``count`` tokens of work to ``phase``, for its throughput."""
        self._tokens[phase] = self._tokens.get(phase, 0) + count

    def memory_by_phase(self) -> dict[str, dict[str, float]]:
        """Of the whole run, GiB: phase -> ``peak``, and by part what was resident when that was most, at its end."""
        return {
            name: {
                "peak": round(peak / GIB, 3),
                **{part: round(size / GIB, 3) for part, size in self._resident.get(name, {}).items()},
            }
            for name, peak in self._highest_in.items()
        }

    def collect(self) -> dict[str, float]:
        """What was booked since the last call, and a clean slate.

        Returns:
            ``time/<phase>_s``, ``memory/<phase>_gib``, ``throughput/<phase>_tokens_per_s`` (phases with
            tokens), and ``time/step_s``: wall time since the last call, phases or not.
        """
        self._close_segment()
        now = time.perf_counter()
        record = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        record["time/step_s"] = now - self._step_began
        record |= {f"memory/{name}_gib": peak / GIB for name, peak in self._peak_bytes.items()}
        for name, tokens in self._tokens.items():
            if self._seconds.get(name):
                record[f"throughput/{name}_tokens_per_s"] = tokens / self._seconds[name]
        self._seconds, self._peak_bytes, self._tokens = {}, {}, {}
        self._step_began = now
        self._open_segment()
        return record

    def _open_segment(self) -> None:
        if self._stack:
            if self._on_phase is not None:
                self._on_phase(self._stack[-1][1])
            self._memory.reset()
            self._segment_began = time.perf_counter()

    def _close_segment(self) -> None:
        if self._stack:
            name = self._stack[-1][0]
            peak = self._memory.peak_bytes()  # before the clock: on CUDA it waits for the phase's kernels
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - self._segment_began
            self._peak_bytes[name] = max(peak, self._peak_bytes.get(name, 0))
            self._highest = max(peak, self._highest)
            self._highest_in[name] = max(peak, self._highest_in.get(name, 0))
            if self.residency is not None:
                held = self.residency.resident_bytes()
                if sum(held.values()) > sum(self._resident.get(name, {}).values()):
                    self._resident[name] = held


class _CudaPeak:
    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


class _HostPeak:
    """Largest resident set since ``reset``, from ``/proc``; from ``getrusage`` where there is none."""

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._clear_refs = proc / "clear_refs"
        self._status = proc / "status"
        self._can_reset = True

    def reset(self) -> None:
        if self._can_reset:
            try:
                self._clear_refs.write_text("5")  # proc(5): sets VmHWM back to the current size
            except OSError:  # no /proc, or a container that mounts it read-only
                self._can_reset = False

    def peak_bytes(self) -> int:
        try:
            lines = self._status.read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
