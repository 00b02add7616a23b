"""One run's checkpoints: saved, gone back to, and each compared with the one before."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempo_megatron.checkpoint.load import resume_checkpoint, rows_of
from tempo_megatron.checkpoint.manifest import WholeCheckpoint, checkpoint_folder, read_manifest
from tempo_megatron.checkpoint.save import CheckpointSave, RunRecord
from tempo_megatron.checkpoint.verify import verify
from tempo_megatron.config.schema import CheckpointConfig
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.locate import Phase, Position, hf_name
from tempo_megatron.parallel.distributed import sum_over_world, world_size
from tempo_megatron.training.engine import MegatronEngine


@dataclass(frozen=True)
class _InFlight:
    """A save that is not committed yet, and what to commit it with."""

    save: CheckpointSave
    protected: Collection[int]
    moved: Collection[str]
    began: float


class RunCheckpoints:
    """All ranks call the same methods at the same points; one save is in flight at most.

    Args:
        hf_dirs: by role, folder with its config and tokenizer.
        tell: called with a line for the user.
        check: called on rank 0 before a checkpoint takes its place; a TempoError ends the run.

    Attributes:
        hf_dirs: from the first checkpoint on those in it, so that the first ones may go.
        unchanged: roles whose weights in the last checkpoint are, bit for bit, those of the one before, although they
            had moved in between.
    """

    def __init__(
        self,
        run_dir: Path,
        engines: Mapping[str, MegatronEngine],
        hf_dirs: Mapping[str, Path],
        settings: CheckpointConfig,
        record: RunRecord,
        tell: Callable[[str], None] = lambda line: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._run_dir, self._engines, self._settings, self._record = run_dir, engines, settings, record
        self._tell, self._check = tell, check
        self.hf_dirs = dict(hf_dirs)
        self.unchanged: list[str] = []
        self._weights: Mapping[str, str] = {}  # digests, of the last checkpoint
        self._in_flight: _InFlight | None = None
        self._figures: dict[str, float] = {}

    def save(
        self,
        state: Mapping[str, Any],
        protected: Collection[int] = (),
        *,
        phase: Phase | None = None,
        rows: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Save everything, or with ``checkpoint.asynchronous`` begin to. Collective; see ``CheckpointSave``.

        An asynchronous save becomes a checkpoint by a later ``poll`` or ``drain``. Nothing of it depends on the engines
        any more when this returns.

        Args:
            state: the trainer's; ``step`` (steps that are complete) and ``phase`` name the checkpoint, ``moved`` the
                roles whose weights should differ from those of the last checkpoint that was saved or restored.
            protected: complete steps whose checkpoints stay.
            phase: the last one that is done of the next step.
            rows: this rank's own tensors, for ``rows`` of a resumed run.

        Returns:
            the checkpoint's folder, there once it is committed.
        """
        self.drain()
        began = time.monotonic()
        position = Position.after(state["step"], phase)
        asynchronous = self._settings.asynchronous
        save = CheckpointSave(
            self._run_dir,
            position,
            self._engines,
            state,
            self.hf_dirs,
            record=self._record,
            rows=rows,
            asynchronous=asynchronous,
        )
        self._in_flight = _InFlight(save, tuple(protected), tuple(state["moved"]), time.monotonic())
        self._figures["checkpoint/snapshot_s"] = time.monotonic() - began
        self._figures["checkpoint/staged_gib"] = save.staged_bytes / 2**30
        if asynchronous:
            save.start()
        else:
            save.write()
            self.drain()
        return save.folder

    @property
    def in_flight(self) -> bool:
        """Whether a save waits to be committed; the same on every rank."""
        return self._in_flight is not None

    def poll(self) -> None:
        """Commit the save in flight if every rank has written its part; to be called at boundaries. Collective.

        Raises:
            RunError: it could not be written, on every rank; earlier checkpoints are as they were.
        """
        if self._in_flight is not None:
            written = sum_over_world(torch.tensor(int(self._in_flight.save.is_written)))
            if written == world_size():
                self.drain()

    def drain(self) -> None:
        """Wait for the save in flight, if there is one, and commit it. Collective.

        Raises:
            RunError: it could not be written, on every rank; earlier checkpoints are as they were.
        """
        if self._in_flight is None:
            return
        flight, self._in_flight = self._in_flight, None
        began = time.monotonic()
        before = {role: digest for role, digest in self._weights.items() if role in flight.moved}
        saved = flight.save.commit(self._settings.keep, flight.protected, before, self._check)
        self._figures["checkpoint/commit_s"] = time.monotonic() - began
        self._figures["checkpoint/in_flight_s"] = time.monotonic() - flight.began
        self._at(saved.folder, saved.weights, saved.unchanged)
        for role in saved.unchanged:
            self._tell(
                f"warning: {saved.folder.name}: the weights of the {role} are, bit for bit, those of the checkpoint "
                "before, although it was updated in between, with a gradient and a learning rate above 0: nothing was "
                "learnt"
            )

    def close(self) -> None:
        """The process is about to end: a save that is in flight is given up, what there is of it stays hidden."""
        if self._in_flight is not None:
            self._in_flight.save.abandon()
            self._in_flight = None

    def figures(self) -> dict[str, float]:
        """What the saves of this rank cost since the last call: seconds in which training waits for a snapshot and for
        a commit, seconds between the two, GiB that the snapshot holds in host memory meanwhile.
        """
        figures, self._figures = self._figures, {}
        return figures

    def resume(self, checkpoint: WholeCheckpoint) -> dict[str, Any]:
        """Restore everything; returns the trainer's state. Collective."""
        state = resume_checkpoint(checkpoint, self._engines)
        self._at(checkpoint.folder, checkpoint.manifest.weights, checkpoint.manifest.unchanged)
        return state

    def rows(self, checkpoint: WholeCheckpoint) -> list[tuple[int, dict[str, Tensor]]]:
        """What ``save`` was given as ``rows``, for this rank to go on with: (rank that saved them, tensors), by rank.

        On another number of ranks they are dealt: those of the old rank r go to rank r modulo the number of ranks.
        """
        return rows_of(checkpoint)

    def go_back(self, step: int) -> dict[str, Any]:
        """Restore the checkpoint of an earlier complete step; returns the trainer's state of then. Collective.

        Raises:
            RunError: it is damaged, or the save in flight could not be written.
        """
        self.drain()
        try:
            return self.resume(verify(checkpoint_folder(self._run_dir, Position(step))))
        except TempoError as error:
            raise RunError(f"the run cannot go back to step {step}: {error}") from error

    def is_there(self, step: int) -> bool:
        """Whether this run's checkpoint of ``step`` is in its folder, and not another run's. For one rank."""
        try:
            return read_manifest(checkpoint_folder(self._run_dir, Position(step))).run == self._record.run
        except TempoError:
            return False

    def _at(self, folder: Path, weights: Mapping[str, str], unchanged: list[str]) -> None:
        self._weights, self.unchanged = weights, unchanged
        self.hf_dirs = {role: folder / hf_name(role) for role in self.hf_dirs}
