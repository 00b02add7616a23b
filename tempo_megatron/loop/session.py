"""Everything a stage works with: models, tokenizer, telemetry, checkpoints. Built once per run."""

from __future__ import annotations

import datetime
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tempo_megatron.checkpoint.hf_engine import export_hf, load_initial_weights
from tempo_megatron.checkpoint.hf_files import load_hf_config
from tempo_megatron.checkpoint.locate import InitSource, newest_checkpoint, resolve_checkpoint, resolve_init
from tempo_megatron.checkpoint.store import check_resumable, resume_checkpoint, save_checkpoint
from tempo_megatron.config.load import dump_config
from tempo_megatron.config.schema import Config, CriticConfig, RoleConfig
from tempo_megatron.data.encode import check_tokenizer
from tempo_megatron.errors import TempoError
from tempo_megatron.loop.data import read_data
from tempo_megatron.model.build import Role
from tempo_megatron.parallel.distributed import on_rank0, rank, start, together, world_size
from tempo_megatron.parallel.groups import ModelParallelGroups
from tempo_megatron.telemetry.environment import environment
from tempo_megatron.telemetry.metrics import MetricsWriter, StepLog
from tempo_megatron.telemetry.phases import PhaseLedger
from tempo_megatron.telemetry.progress import Progress
from tempo_megatron.telemetry.run_folder import CONFIG_FILE, ROLLOUTS_FILE, write_run_info
from tempo_megatron.training.engine import MegatronEngine


class Session:
    """A run's models and sinks on this rank.

    Attributes:
        engines: by role; ``engines["critic"]`` is absent in the sft stage.
        data: what the stage trains on.
        resumed: the trainer's state from the checkpoint that the run goes on from, or None.
        writer, rollout_log: only on rank 0, while ``running``.
    """

    def __init__(self, config: Config) -> None:
        start(config.launch.threads_per_rank, config.launch.timeout_s)
        self.config = config
        self.output = Path(config.output_dir)
        self._began = time.monotonic()
        self._started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.is_main = rank() == 0
        self._checkpoint = on_rank0(self._find_checkpoint)
        roles = self._roles().items()
        sources = together(lambda: {role: resolve_init(c.init, f"{role}.init") for role, c in roles})
        self.hf_dir = sources["actor"].hf_dir
        self.hf_config = together(lambda: load_hf_config(self.hf_dir))
        self.tokenizer = together(lambda: load_tokenizer(self.hf_dir, self.hf_config.vocab_size))
        self.progress = Progress(f"{config.stage} {self.output.name}", config.steps, enabled=self.is_main)
        self.ledger = PhaseLedger(on_phase=self.progress.phase)
        with self.ledger.phase("data"):
            self.data = read_data(config, self.tokenizer)
        self.engines: dict[str, MegatronEngine] = {}
        self.hf_dirs: dict[str, Path] = {}
        self.resumed: dict[str, Any] | None = None
        with self.ledger.phase("load"):
            self._build_engines(sources)
        self.writer: MetricsWriter | None = None
        self.rollout_log: StepLog | None = None
        self._closing = ExitStack()

    def _roles(self) -> dict[Role, RoleConfig]:
        roles: dict[Role, RoleConfig] = {"actor": self.config.actor}
        if self.config.critic is not None:
            roles["critic"] = self.config.critic
        return roles

    def _find_checkpoint(self) -> Path | None:
        found = self._wanted_checkpoint()
        if found is not None:
            check_resumable(found, self._roles())
        return found

    def _wanted_checkpoint(self) -> Path | None:
        newest = newest_checkpoint(self.output)
        if self.config.resume == "auto":
            return newest
        if self.config.resume == "never":
            if newest is not None:
                raise TempoError(
                    f"resume: never, but {newest} is there; choose another output_dir, or resume=auto to go on from it"
                )
            return None
        return resolve_checkpoint(self.config.resume, "resume")

    def _build_engines(self, sources: dict[Role, InitSource]) -> None:
        groups: dict[str, ModelParallelGroups] = {}
        for role, role_config in self._roles().items():
            layout = role_config.parallel.model_dump_json()
            if layout not in groups:
                groups[layout] = ModelParallelGroups(role_config.parallel, self.config.launch.timeout_s)
            source = sources[role]
            hf_config = together(partial(load_hf_config, source.hf_dir))
            self.hf_dirs[role] = source.hf_dir
            head_bias = role_config.initial_bias if isinstance(role_config, CriticConfig) else 0.0
            engine = MegatronEngine(
                role,
                role_config,
                hf_config,
                groups[layout],
                seed=self.config.seed,
                temperature=self.config.rollout.temperature if self.config.stage != "sft" else 1.0,
                head_bias=head_bias,
            )
            if self._checkpoint is None:
                load_initial_weights(engine, source)
            engine.start_optimizer()
            self.engines[role] = engine
        if self._checkpoint is not None:
            self.resumed = resume_checkpoint(self._checkpoint, self.engines)

    def _open_outputs(self) -> None:
        """Only once everything is built: a run that is refused leaves an earlier one's files as they were."""
        config = self.config
        last_step = self.resumed["step"] if self.resumed else None
        self.output.mkdir(parents=True, exist_ok=True)
        text = dump_config(config)
        (self.output / CONFIG_FILE).write_text(text)
        self.write_info()
        self.writer = self._closing.enter_context(
            MetricsWriter(self.output, config.telemetry, yaml.safe_load(text), self.output.name, last_step)
        )
        self.rollout_log = StepLog(self.output / ROLLOUTS_FILE, last_step)
        self._closing.callback(self.rollout_log.close)

    def stop_token_ids(self) -> list[int]:
        """Every end-of-sequence id of the tokenizer and of the folder's generation config."""
        ids = {self.tokenizer.eos_token_id}
        if (self.hf_dir / "generation_config.json").is_file():
            extra = GenerationConfig.from_pretrained(self.hf_dir, local_files_only=True).eos_token_id
            ids.update(extra if isinstance(extra, list) else [extra])
        return sorted(i for i in ids if i is not None)

    def write_info(self) -> None:
        """Update run.json (rank 0)."""
        write_run_info(
            self.output,
            environment={**environment(), "world_size": world_size()},
            stage=self.config.stage,
            started=self._started,
            wall_s=round(time.monotonic() - self._began, 1),
            peak_memory_gib=round(self.ledger.peak_gib, 2),
        )

    def record(self, step: int, progressed: int, metrics: dict[str, Any], shown: dict[str, str]) -> None:
        """Write the step's one metrics record and move the progress bar.

        Args:
            progressed: position of the bar, in ``config.steps``.
            shown: label -> metric key, for the bar.
        """
        record = {"step": step, "stage": self.config.stage, **metrics, **self.ledger.collect()}
        if self.writer is not None:
            self.writer.write(record)
        self.progress.advance(progressed, {k: v for k, key in shown.items() if (v := record.get(key)) is not None})

    def save(self, state: dict[str, Any], protected: Collection[int] = ()) -> None:
        """Checkpoint everything; ``state["step"]`` names it. Those of the ``protected`` steps stay."""
        keep = self.config.checkpoint.keep
        with self.ledger.phase("checkpoint"):
            save_checkpoint(self.output, state["step"], self.engines, state, self.hf_dirs, keep, protected)

    def export_hf(self) -> None:
        """Write ``hf/actor`` and ``hf/critic`` (its head as other programs of its family read it)."""
        for role, engine in self.engines.items():
            export_hf(engine, self.hf_dirs[role], self.output / "hf" / role, self.config.rollout.bucket_mib)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        if self.writer is not None:
            self.write_info()
        self._closing.close()

    @contextmanager
    def running(self, at: int) -> Iterator[None]:
        """The run's files, and the progress bar from step ``at``."""
        on_rank0(self._open_outputs)
        self.progress.start(at)
        if self.resumed is not None:
            self.progress.note(f"resumed from {self._checkpoint}")
        yield


def load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """The fast tokenizer of an HF folder; TempoError if it is missing or does not fit the model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TempoError(f"{folder}: no usable tokenizer: {' '.join(str(error).split())[:200]}") from error
    check_tokenizer(tokenizer, vocab_size)
    return tokenizer
