"""What leaves the device for each phase of a step, and comes back for it (``config.residency`` has the table).

Phases that are not in the table change nothing: they work with what is there, or wake one role at a time for as long as
they need it (a checkpoint: ``EngineParts.awake``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tempo_megatron.config.residency import NEEDS, ROLLOUT_WEIGHTS, SYNC
from tempo_megatron.config.schema import ResidencyConfig
from tempo_megatron.parallel.parts import Part, State

if TYPE_CHECKING:
    from tempo_megatron.rollout.engine import RolloutEngine
    from tempo_megatron.training.engine import MegatronEngine


class Residency:
    """The parts of this rank, and where they are.

    Args:
        folder: for what leaves where there is no GPU.
        phase: called for the name of the current phase.
    """

    def __init__(self, config: ResidencyConfig, folder: Path, phase: Callable[[], str | None]) -> None:
        self._config, self._folder, self._phase = config, folder, phase
        self._parts: dict[str, Part] = {}
        self._leaves: set[str] = set()
        self._refill: Callable[[], None] | None = None

    def add_engine(self, engine: MegatronEngine) -> None:
        """Its gradient buffers leave at once, where they may: nothing is in them yet."""
        parts = engine.parts
        parts.folder = self._folder
        leaving = {"none": (), "optimizer": (parts.gradients, parts.optimizer), "all": tuple(parts)}
        for part in parts:
            self._add(part, leaves=part in leaving[self._config.offload])
        self._put_to_sleep([parts.gradients])

    def add_rollout(self, rollout: RolloutEngine, refill: Callable[[], None]) -> None:
        """``refill`` is phase ``sync`` again: it brings the weights that the engine has let go of."""
        for part in rollout.parts:
            self._add(part, leaves=self._config.sleep)
        self._refill = refill

    def trainers_sleep(self, role: str = "") -> None:
        """All that may leave of the role, or of every role; for phases in which engines are built and loaded."""
        self._put_to_sleep([part for name, part in self._parts.items() if name.startswith(role)])

    def has_to_move(self, phase: str) -> bool:
        """Whether ``enter`` of the phase has anything to do."""
        needs = NEEDS.get(phase)
        return needs is not None and bool(self._is_empty(phase) or self._leaving(needs) or self._coming(needs))

    def enter(self, phase: str) -> None:
        """What the phase does not need leaves, then what it needs comes. Collective where vLLM's weights come."""
        if self._is_empty(phase) and self._refill is not None:
            self._refill()
        needs = NEEDS[phase]
        self._put_to_sleep(self._leaving(needs))
        for part in self._coming(needs):
            part.wake()

    def resident_bytes(self) -> dict[str, int]:
        """By part, of those that are awake; exact, from the sizes of their tensors."""
        return {name: part.resident_bytes() for name, part in self._parts.items() if part.is_awake}

    def _add(self, part: Part, *, leaves: bool) -> None:
        self._parts[part.name] = part
        part.phase = self._phase
        part.woken_by = "phase " + " or ".join(phase for phase, needs in NEEDS.items() if part.name in needs)
        if leaves:
            self._leaves.add(part.name)

    def _is_empty(self, phase: str) -> bool:
        """Whether the phase samples, and vLLM has let go of its weights since they were brought."""
        part = self._parts.get(ROLLOUT_WEIGHTS)
        if part is None or phase == SYNC or ROLLOUT_WEIGHTS not in NEEDS[phase]:
            return False
        return part.state is not State.RESIDENT

    def _leaving(self, needs: frozenset[str]) -> list[Part]:
        def stays(part: Part) -> bool:
            return not part.is_awake or bool(needs & {part.name, *(other.name for other in part.together)})

        return [part for name, part in self._parts.items() if name in self._leaves and not stays(part)]

    def _coming(self, needs: frozenset[str]) -> list[Part]:
        return [part for name, part in self._parts.items() if name in needs and not part.is_awake]

    def _put_to_sleep(self, parts: list[Part]) -> None:
        for part in parts:
            if part.name in self._leaves:
                part.sleep()
