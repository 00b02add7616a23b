"""Everything a stage works with: models, data, telemetry, checkpoints. Built once per run."""

from __future__ import annotations

import datetime
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from torch import Tensor

from tempo_megatron.checkpoint.changes import digest_data
from tempo_megatron.checkpoint.hf_engine import export_hf, load_initial_weights
from tempo_megatron.checkpoint.resume import Resumption, find_resumption
from tempo_megatron.checkpoint.run import RunCheckpoints
from tempo_megatron.checkpoint.save import RunRecord
from tempo_megatron.cluster.starts import forget_start, note_start
from tempo_megatron.config.load import dump_config
from tempo_megatron.config.schema import Config
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.locate import InitSource, Phase, hf_name, newest_checkpoint
from tempo_megatron.loop.announce import outcome, plan
from tempo_megatron.loop.data import read_data
from tempo_megatron.loop.runtime import Runtime, claim_output, roles_of
from tempo_megatron.loop.stopping import StopHere
from tempo_megatron.model.hf_tensors import Role
from tempo_megatron.parallel.distributed import on_rank0, start, world_size
from tempo_megatron.parallel.parts import awake
from tempo_megatron.telemetry.environment import environment
from tempo_megatron.telemetry.metrics import MetricsWriter, StepLog
from tempo_megatron.telemetry.progress import run_title
from tempo_megatron.telemetry.run_folder import (
    CONFIG_FILE,
    EVALUATIONS_FILE,
    ROLLOUTS_FILE,
    Finished,
    load_run,
    write_run_info,
    write_whole,
)


class Session(Runtime):
    """A run's models and sinks on this rank.

    Attributes:
        resumed: the trainer's state from the checkpoint that the run goes on from, or None.
        writer: only on rank 0, while ``running``.
    """

    def __init__(self, config: Config) -> None:
        start(config.launch.threads_per_rank, config.launch.timeout_s, config.watchdog, Path(config.output_dir))
        self._began = time.monotonic()
        self._started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.writer: MetricsWriter | None = None
        self._notes: list[str] = []  # of the files that it goes on with, on rank 0
        self._closing = ExitStack()
        self._claim = claim_output(Path(config.output_dir), self._closing)
        self._noted = False  # this start, on rank 0
        try:
            self._build(config)
        except BaseException as error:
            self._forget_if_refused(error)
            self._closing.close()
            raise

    def _build(self, config: Config) -> None:
        self._resumption: Resumption | None = None
        super().__init__(config, run_title(config.stage, config.output_dir), config.steps)
        with self.ledger.phase("data"):
            self.data = read_data(config, self.tokenizer)
        self._tell_plan()
        on_rank0(self._note_start)
        self._finished: Finished | None = None
        self._stopped: str | None = None
        self.build_engines(trainable=True)
        self.checkpoints = self._run_checkpoints()
        self.resumed = self._load_engines()

    def _note_start(self) -> None:
        place = None if self._resumption is None else self._resumption.checkpoint.folder.name
        note_start(self.output, world_size(), place, self.config.launch.max_idle_restarts)
        self._noted = True

    def _forget_if_refused(self, error: BaseException | None) -> None:
        """A run that is refused leaves its folder as it was."""
        refused = isinstance(error, TempoError) and not isinstance(error, RunError)
        if self._noted and self.writer is None and refused:
            forget_start(self.output)

    def find_sources(self) -> dict[Role, InitSource]:
        with self.ledger.phase("verify"):
            self._data_digests = on_rank0(partial(digest_data, self.config))
            self._resumption = find_resumption(self.config, roles_of(self.config), self._data_digests)
        if self._resumption is None:
            return super().find_sources()
        folder = self._resumption.checkpoint.folder
        return {r: InitSource("checkpoint", folder, folder / hf_name(r)) for r in roles_of(self.config)}

    def _tell_plan(self) -> None:
        roles = {role: (settings, self.sources[role]) for role, settings in roles_of(self.config).items()}
        resumption = [] if self._resumption is None else self._resumption.notes()
        for line in plan(self.config, roles, self.data, world_size(), resumption):
            self.progress.note(line)

    def _run_checkpoints(self) -> RunCheckpoints:
        if self._resumption is not None:
            run = self._resumption.checkpoint.manifest.run
        else:
            run = on_rank0(partial(secrets.token_hex, 8))
        record = RunRecord(run, self.config.model_dump(mode="json"), self._data_digests)
        checkpoints = RunCheckpoints(
            self.output,
            self.engines,
            self.hf_dirs,
            self.config.checkpoint,
            record,
            self.progress.note,
            self._check_claim,
        )
        self._closing.callback(checkpoints.close)
        return checkpoints

    def _load_engines(self) -> dict[str, Any] | None:
        for role, source in self.sources.items():
            with self.ledger.phase("load", f"the weights of the {role}"):
                if self._resumption is None:
                    load_initial_weights(self.engines[role], source)
                self.engines[role].start_optimizer()
                self.residency.trainers_sleep(role)
        if self._resumption is None:
            return None
        checkpoint = self._resumption.checkpoint
        with self.ledger.phase("load", checkpoint.folder.name):
            return self.checkpoints.resume(checkpoint)

    def _open_outputs(self) -> None:
        """Only once everything is built: a run that is refused leaves an earlier one's files as they were."""
        config = self.config
        last_step = self.resumed["step"] if self.resumed else None
        self.output.mkdir(parents=True, exist_ok=True)
        if self._resumption is not None:
            self._resumption.set_damaged_aside()
        text = dump_config(config)
        write_whole(self.output / CONFIG_FILE, text)
        self.write_info()
        self.writer = self._closing.enter_context(
            MetricsWriter(self.output, config.telemetry, yaml.safe_load(text), self.output.name, last_step)
        )
        self.rollout_log = StepLog(self.output / ROLLOUTS_FILE, last_step)
        self._closing.callback(self.rollout_log.close)
        self.evaluation_log = StepLog(self.output / EVALUATIONS_FILE, last_step)
        self._closing.callback(self.evaluation_log.close)
        self._notes += [*self.writer.notes, *self.rollout_log.notes, *self.evaluation_log.notes]

    @property
    def _wall_s(self) -> float:
        return time.monotonic() - self._began

    def resumed_rows(self) -> list[tuple[int, dict[str, Tensor]]]:
        """Of a step that the run goes on within: (old rank, its tensors), of those that this rank takes over."""
        assert self._resumption is not None
        return self.checkpoints.rows(self._resumption.checkpoint)

    def stop(self, stop: StopHere) -> None:
        """The run ends here because it was asked to, and all is saved. Collective."""
        self._drain()
        newest = newest_checkpoint(self.output)
        if newest is None:
            kept = "nothing had been trained yet; the same command begins anew"
        else:
            kept = f"{'saved' if stop.new else 'no change since'} {newest.name}; the same command goes on from there"
        self._stopped = f"stopped by {stop.why}: {kept}"

    def finish(self, step: int, policy_updates: int) -> None:
        """The run has done all it was asked for. Collective."""
        self._drain()
        self._finished = Finished(step, policy_updates)

    def poll_checkpoint(self) -> None:
        """At a boundary: what was being saved becomes a checkpoint, if it is written. Collective."""
        if self.checkpoints.in_flight:
            with self.ledger.phase("checkpoint"):
                self.checkpoints.poll()

    def _drain(self) -> None:
        """What is being saved is on disk before the process ends."""
        with self.ledger.phase("checkpoint"):
            self.checkpoints.drain()

    def write_info(self) -> None:
        """Update run.json (rank 0)."""
        write_run_info(
            self.output,
            environment={**environment(), "world_size": world_size()},
            stage=self.config.stage,
            started=self._started,
            wall_s=round(self._wall_s, 1),
            peak_memory_gib=round(self.ledger.peak_gib, 2),
            memory_by_phase=self.ledger.memory_by_phase(),
            finished=self._finished,
        )

    def record(self, step: int, progressed: int, metrics: dict[str, Any], shown: dict[str, float]) -> None:
        """Write the step's one metrics record and move the progress bar.  Collective.

        Args:
            progressed: position of the bar, in ``config.steps``.
            shown: label -> figure, for the bar.

        Raises:
            RunError: the run has lost its folder to another one, or the record or the checkpoint in flight could not be
            written.
        """
        self.poll_checkpoint()
        record = {"step": step, "stage": self.config.stage, **metrics, **self.ledger.collect()}
        record |= self.checkpoints.figures()
        if self.checkpoints.unchanged:
            record["checkpoint/unchanged_roles"] = len(self.checkpoints.unchanged)
        with self.ledger.phase("record"):  # of the next record's time
            on_rank0(partial(self._write, record))
        self.progress.advance(progressed, shown)

    def _write(self, record: dict[str, Any]) -> None:
        assert self.writer is not None
        self._check_claim()
        self.writer.write(record)

    def _check_claim(self) -> None:
        assert self._claim is not None
        self._claim.check()

    def save(
        self,
        state: dict[str, Any],
        protected: Collection[int] = (),
        phase: Phase | None = None,
        rows: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Checkpoint everything; ``state["step"]`` names it. Those of the ``protected`` steps stay.

        Args:
            phase: of the next step, behind which this is; ``rows``: this rank's tensors of that step.
        """
        with self.ledger.phase("checkpoint"):
            self.checkpoints.save(state, protected, phase=phase, rows=rows)

    def export_hf(self) -> None:
        """Write ``hf/actor`` and ``hf/critic`` (its head as other programs of its family read it)."""
        for role, engine in self.engines.items():
            target = self.output / "hf" / role
            with awake(engine.parts.weights):
                export_hf(engine, self.checkpoints.hf_dirs[role], target, self.config.rollout.bucket_mib)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        if self.writer is not None and self._claim is not None and self._claim.is_held:
            with suppress(*(OSError,) if error is not None else ()):  # a full disk has been told
                self.write_info()
        self._forget_if_refused(error)
        self._closing.close()
        if self._stopped is not None:
            self.progress.note(self._stopped)
        if self.writer is not None and self._finished is not None:
            peak = self.ledger.peak_gib
            memory = self.ledger.memory_by_phase()
            for line in outcome(self.config, load_run(self.output), self._finished, self._wall_s, peak, memory):
                self.progress.note(line)

    @contextmanager
    def running(self, at: int) -> Iterator[None]:
        """The run's files, and the progress bar from step ``at``."""
        on_rank0(self._open_outputs)
        self.progress.start(at)
        for line in self._notes:
            self.progress.note(line)
        yield
