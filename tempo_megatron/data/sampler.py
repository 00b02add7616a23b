"""Which prompts come next; its state is a few numbers, so that a resumed run draws what the other would have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tempo_megatron.errors import TempoError


class PromptSampler:
    """Positions 0 ... size-1 in endless epochs, each its own permutation, drawn by ``(seed, epoch)`` alone.

    Args:
        size: number of records.
        seed: samplers with other seeds draw independently.

    Raises:
        TempoError: there is nothing to draw from.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise TempoError("data.train_files: no prompts to draw from (size 0)")
        self._size = size
        self._seed = seed
        self._carried: list[int] = []
        self._start_epoch(0, drawn=0)

    def draw(self, k: int) -> list[int]:
        """The next ``k`` positions: carried-over ones first, then the epoch's order, into the next epoch if need be."""
        picks, self._carried = self._carried[:k], self._carried[k:]
        while len(picks) < k:
            if self._drawn == self._size:
                self._start_epoch(self._epoch + 1, drawn=0)
            fresh = self._order[self._drawn : self._drawn + k - len(picks)]
            self._drawn += len(fresh)
            picks.extend(fresh)
        return picks

    def put_back(self, positions: Iterable[int]) -> None:
        """Prompts that were drawn but not used; they come first next time, in this order."""
        self._carried.extend(positions)

    def state_dict(self) -> dict[str, Any]:
        """All of the state, in JSON types."""
        return {
            "size": self._size,
            "seed": self._seed,
            "epoch": self._epoch,
            "drawn": self._drawn,
            "carried": list(self._carried),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where ``state`` was taken.

        Raises:
            TempoError: the state is of another set of prompts or another seed.
        """
        for key, mine in (("size", self._size), ("seed", self._seed)):
            if state[key] != mine:
                raise TempoError(
                    f"resume: the checkpoint's prompt sampler has {key} {state[key]}, this run has {mine}; "
                    "the same data.train_files and seed are needed"
                )
        self._carried = list(state["carried"])
        self._start_epoch(state["epoch"], drawn=state["drawn"])

    def _start_epoch(self, epoch: int, drawn: int) -> None:
        self._epoch, self._drawn = epoch, drawn
        entropy = (self._seed % 2**64, epoch)  # SeedSequence takes no negative seed
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
        self._order: list[int] = generator.permutation(self._size).tolist()
