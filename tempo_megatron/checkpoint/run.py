"""One run's checkpoints: saved, gone back to, and each compared with the one before."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tempo_megatron.checkpoint.load import resume_checkpoint, rows_of
from tempo_megatron.checkpoint.manifest import WholeCheckpoint, checkpoint_folder, read_manifest
from tempo_megatron.checkpoint.save import RunRecord, save_checkpoint
from tempo_megatron.checkpoint.verify import verify
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.locate import Phase, Position, hf_name
from tempo_megatron.training.engine import MegatronEngine


class RunCheckpoints:
    """Args:
        hf_dirs: by role, folder with its config and tokenizer.
        keep: newest checkpoints that stay.

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
        keep: int,
        record: RunRecord,
    ) -> None:
        self._run_dir, self._engines, self._keep, self._record = run_dir, engines, keep, record
        self.hf_dirs = dict(hf_dirs)
        self.unchanged: list[str] = []
        self._weights: Mapping[str, str] = {}  # digests, of the last checkpoint

    def save(
        self,
        state: Mapping[str, Any],
        protected: Collection[int] = (),
        *,
        phase: Phase | None = None,
        rows: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Save everything. Collective; see ``save_checkpoint``.

        Args:
            state: the trainer's; ``step`` (steps that are complete) and ``phase`` name the checkpoint, ``moved`` the
                roles whose weights should differ from those of the last checkpoint that was saved or restored.
            protected: complete steps whose checkpoints stay.
            phase: the last one that is done of the next step.
            rows: this rank's own tensors, for ``rows`` of a resumed run.
        """
        before = {role: digest for role, digest in self._weights.items() if role in state["moved"]}
        saved = save_checkpoint(
            self._run_dir,
            state["step"],
            self._engines,
            state,
            self.hf_dirs,
            self._keep,
            protected,
            record=self._record,
            before=before,
            phase=phase,
            rows=rows,
        )
        self._at(saved.folder, saved.weights, saved.unchanged)
        return saved.folder

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
            RunError: it is damaged.
        """
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
