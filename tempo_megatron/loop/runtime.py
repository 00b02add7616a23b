"""The models of a config on this rank, with what they are fed and what counts their time."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig

from tempo_megatron.checkpoint.hf_read import load_hf_config
from tempo_megatron.cluster.claim import Claim, claimed
from tempo_megatron.cluster.launch import ranks_of_node
from tempo_megatron.config.rollout import GIB, RolloutConfig
from tempo_megatron.config.schema import Config, CriticConfig, RoleConfig
from tempo_megatron.data.tokenizer import load_tokenizer, stop_token_ids
from tempo_megatron.locate import InitSource, resolve_init
from tempo_megatron.loop.data import ORACLE_SOURCE, PromptData, SftData
from tempo_megatron.loop.residency import Residency
from tempo_megatron.model.hf_tensors import Role
from tempo_megatron.parallel.distributed import enter_phase, gather_objects, on_all_ranks, rank, world_size
from tempo_megatron.parallel.groups import ModelParallelGroups
from tempo_megatron.planner.refuse import with_kv_cache_here
from tempo_megatron.rollout.engine import RolloutEngine
from tempo_megatron.telemetry.metrics import StepLog
from tempo_megatron.telemetry.phases import PhaseLedger
from tempo_megatron.telemetry.progress import Progress
from tempo_megatron.training.engine import MegatronEngine
from tempo_megatron.verifiers.service import VerifierService


class Trainers:
    """The engines of a config, and what counts their time: what the steps of training know of a job.

    Attributes:
        sources: by role, where its first weights lie.
        hf_config: the actor's.
        engines: by role, from ``build_engines`` on; ``engines["critic"]`` is absent where the config has no critic.
        residency: what of the engines is on the device, by phase.
    """

    config: Config
    ledger: PhaseLedger
    residency: Residency
    sources: dict[Role, InitSource]
    hf_config: PretrainedConfig
    engines: dict[str, MegatronEngine]
    hf_dirs: dict[str, Path]

    def build_engines(self, *, trainable: bool, engine: Callable[..., MegatronEngine] = MegatronEngine) -> None:
        """Every role's engine, on process groups that equal layouts share; the weights come later."""
        groups: dict[str, ModelParallelGroups] = {}
        for role, role_config in roles_of(self.config).items():
            layout = role_config.parallel.model_dump_json()
            if layout not in groups:
                groups[layout] = ModelParallelGroups(role_config.parallel, self.config.launch.timeout_s)
            hf_dir = self.sources[role].hf_dir
            self.hf_dirs[role] = hf_dir
            with self.ledger.phase("load", f"the {role}"):
                self.engines[role] = engine(
                    role,
                    role_config,
                    on_all_ranks(partial(load_hf_config, hf_dir)),
                    groups[layout],
                    seed=self.config.seed,
                    temperature=self.config.rollout.temperature if self.config.stage != "sft" else 1.0,
                    head_bias=role_config.initial_bias if isinstance(role_config, CriticConfig) else 0.0,
                    trainable=trainable,
                )
                self.residency.add_engine(self.engines[role])


class Runtime(Trainers):
    """Tokenizer and engines; the world is joined before.

    Attributes:
        stop_token_ids: what ends a response.
        data: what is trained on or evaluated; whoever builds this sets it.
        rollout_log, evaluation_log: only on rank 0 of a run, while it is running.
    """

    data: PromptData | SftData

    def __init__(self, config: Config, title: str, total: int) -> None:
        self.config = config
        self.output = Path(config.output_dir)
        self.is_main = rank() == 0
        self.progress = Progress(title, total, enabled=self.is_main)
        self.ledger = PhaseLedger(on_phase=self._enter_phase)
        self.residency = Residency(config.residency, self.output, phase=lambda: self.ledger.current)
        self.ledger.residency = self.residency
        self.sources = self.find_sources()
        self.hf_dir = self.sources["actor"].hf_dir
        self.hf_config = on_all_ranks(lambda: load_hf_config(self.hf_dir))
        vocab_size = self.hf_config.vocab_size
        with self.ledger.phase("tokenizer"):
            self.tokenizer = on_all_ranks(lambda: load_tokenizer(self.hf_dir, vocab_size))
            self.stop_token_ids = on_all_ranks(lambda: stop_token_ids(self.hf_dir, self.tokenizer, vocab_size))
        self.engines = {}
        self.hf_dirs = {}
        self.rollout_log: StepLog | None = None
        self.evaluation_log: StepLog | None = None

    def _enter_phase(self, name: str) -> None:
        self.progress.phase(name)
        enter_phase(name, first=self.ledger.is_first)

    def find_sources(self) -> dict[Role, InitSource]:
        """Where each role's config, tokenizer and weights are taken from. Collective."""
        roles = roles_of(self.config).items()
        return on_all_ranks(lambda: {role: resolve_init(c.init, f"{role}.init") for role, c in roles})


def claim_output(folder: Path, closing: ExitStack) -> Claim | None:
    """Rank 0 holds the folder until ``closing`` closes; collective.

    Raises:
        TempoError: on every rank, when another run holds it or it cannot be written.
    """
    return on_all_ranks(lambda: closing.enter_context(claimed(folder)) if rank() == 0 else None)


def start_rollout(runtime: Runtime) -> RolloutEngine:
    """vLLM for the actor, without its weights yet."""
    data = runtime.config.data
    with runtime.ledger.phase("load", "vLLM"):
        runtime.residency.trainers_sleep()
        return RolloutEngine(
            runtime.hf_dir,
            _with_kv_cache(runtime),
            max_model_len=data.max_prompt_tokens + data.max_response_tokens,
            seed=runtime.config.seed,
            stop_token_ids=runtime.stop_token_ids,
            sleeps=runtime.config.residency.sleep,
        )


def _with_kv_cache(runtime: Runtime) -> RolloutConfig:
    """The ``rollout`` section with the size of the KV cache as a number, which is the same on all ranks. Collective."""
    config = runtime.config
    if config.rollout.kv_cache_gib != "auto":
        return config.rollout
    folders = {str(role): source.hf_dir for role, source in runtime.sources.items()}
    found = on_all_ranks(lambda: with_kv_cache_here(config, folders, world_size(), ranks_of_node()).rollout)
    smallest = min(gather_objects(found), key=lambda rollout: rollout.kv_cache_bytes)
    runtime.progress.note(f"rollout.kv_cache_gib: auto: {smallest.kv_cache_bytes / GIB:.3g}")
    return smallest


def start_verifier(runtime: Runtime, closing: ExitStack) -> VerifierService | None:
    """The verifier's processes beside the first rank of every vLLM replica, with the answers of the evaluation sets.

    Collective; ``closing`` ends them. They start while vLLM is built: ``ready`` tells of what is wrong with them.
    """
    config = runtime.config
    leads = rank() % config.rollout.tensor_parallel_size == 0
    here = socket.gethostname()
    leaders = [r for r, place in enumerate(gather_objects((here, leads))) if place == (here, True)]
    if not leads:
        return None
    sources = {s.name: s.files for s in config.evaluation.sets}
    if config.data.oracle_files:
        sources[ORACLE_SOURCE] = config.data.oracle_files
    settings = config.verifier.model_copy(
        update={"workers": _share(config.verifier.workers, leaders.index(rank()), len(leaders))}
    )
    return closing.enter_context(VerifierService(sources, settings, config.data.answer_types))


def await_verifier(verifier: VerifierService | None) -> None:
    """Collective; raises on every rank what is wrong with one rank's processes."""
    on_all_ranks(lambda: None if verifier is None else verifier.ready())


def _share(workers: int, index: int, leaders: int) -> int:
    """How many of a node's workers the leader at ``index`` has: as many as the others, and at least one."""
    return max(1, workers // leaders + int(index < workers % leaders))


def roles_of(config: Config) -> dict[Role, RoleConfig]:
    roles: dict[Role, RoleConfig] = {"actor": config.actor}
    if config.critic is not None:
        roles["critic"] = config.critic
    return roles
