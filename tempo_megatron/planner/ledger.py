"""The ledger: what is on a rank's device and on a host in each phase of a job, as ranges of bytes.

``plan_ledger`` is a function of the configuration, the models' ``config.json`` and the cluster; it starts nothing,
opens nothing and knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tempo_megatron.config.methods import METHODS
from tempo_megatron.config.residency import KV_CACHE, NEEDS, ROLLOUT_WEIGHTS, SYNC
from tempo_megatron.config.schema import Config, RoleConfig
from tempo_megatron.planner.hardware import Cluster
from tempo_megatron.planner.layers import Spec
from tempo_megatron.planner.overhead import SNAPSHOT, device_overhead, host_items, rollout_workspace, snapshot
from tempo_megatron.planner.parameters import Role, RoleLayout
from tempo_megatron.planner.peaks import Load, RolePeaks
from tempo_megatron.planner.range import GIB, Bytes, Item
from tempo_megatron.planner.rollout import KVCache, cache_bytes, kv_cache, rollout_weights
from tempo_megatron.planner.schedule import Peaks
from tempo_megatron.planner.sizes import ITEMSIZE, ModelSizes
from tempo_megatron.planner.state import StateBytes, staged_at, state_at

#: What ``rollout.kv_cache_gib: auto`` fills of a GPU at most, with everything else in its fullest phase; and what it
#: takes of a host, which ranks and other programs share.
FILLED, CPU_CACHE = 0.95, GIB

#: What no item counts.
UNMODELLED = (
    "rounding of a checkpoint's pinned memory: torch takes powers of two for each tensor, twice its bytes at most",
    "fragmentation of the allocator beyond 5 %",
    "NCCL buffers beyond the overhead's range, and cuBLAS workspaces of unusual shapes",
    "what other processes have on the card",
    "page cache of files that are read and written",
    "experts whose busiest rank gets more than 1.25 times its share of tokens",
)


@dataclass(frozen=True)
class Phase:
    """One phase on the rank that holds most in it.

    Attributes:
        rank: which one; ``where``: its pipeline stages.
        least: ``certain`` of the rank that holds least.
    """

    name: str
    rank: int
    where: str
    items: tuple[Item, ...]
    least: int = 0

    @property
    def total(self) -> Bytes:
        return sum((item.bytes for item in self.items), Bytes(0, 0))

    @property
    def certain(self) -> int:
        """Bytes that are there whatever the lengths of responses: weights, states, caches."""
        return sum(item.bytes.low for item in self.items if item.exact)


@dataclass(frozen=True)
class Ledger:
    """Of a whole job.

    Attributes:
        phases: on the device, in the order of a step.
        host: of the fullest node, beside its devices.
        kv: the cache of one replica's rank; None where nothing is sampled.
    """

    cluster: Cluster
    phases: tuple[Phase, ...]
    host: tuple[Item, ...]
    kv: KVCache | None
    states: dict[str, StateBytes]
    unmodelled: tuple[str, ...]

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total.high)

    @property
    def host_total(self) -> Bytes:
        return sum((item.bytes for item in self.host), Bytes(0, 0))

    @property
    def certain_host(self) -> int:
        return sum(item.bytes.low for item in self.host if item.exact)

    @property
    def verdict(self) -> str:
        """``fits``, ``may not fit`` (the upper end is beyond a memory) or ``does not fit`` (the lower end is, or the KV
        cache has no room for one sequence of full length, which vLLM refuses).
        """
        card, host = self.cluster.card.memory, self.cluster.host_memory
        ends = [(self.fullest.total, card)] + ([] if host is None else [(self.host_total, host)])
        if self.kv is not None and self.kv.sequences < 1:
            return "does not fit"
        if any(phase.total.low > card for phase in self.phases) or any(used.low > room for used, room in ends):
            return "does not fit"
        if any(used.high > room for used, room in ends):
            return "may not fit"
        return "fits"


def sizes_of(config: Any) -> ModelSizes:
    """From ``config.json``'s contents, a ``PretrainedConfig``, or sizes."""
    if isinstance(config, ModelSizes):
        return config
    return ModelSizes.of(config if isinstance(config, Mapping) else config.to_dict())


def plan_ledger(config: Config, hf_configs: Mapping[str, Any], cluster: Cluster) -> Ledger:
    """What the job takes.

    Args:
        config: of the job; layouts that fit the models and the cluster.
        hf_configs: by role, what its ``config.json`` says (a mapping, a ``PretrainedConfig`` or ``ModelSizes``).
    """
    return _Planner(config, {role: sizes_of(values) for role, values in hf_configs.items()}, cluster).ledger()


def certain_ledger(config: Config, hf_configs: Mapping[str, Any], cluster: Cluster) -> Ledger:
    """The same without what a phase's work takes: only what is there whatever the data are."""
    sizes = {role: sizes_of(values) for role, values in hf_configs.items()}
    return _Planner(config, sizes, cluster, working=False).ledger()


def with_kv_cache(config: Config, hf_configs: Mapping[str, Any], cluster: Cluster) -> Config:
    """The configuration with the ``rollout.kv_cache_gib`` that its ledger has: a number, also where it says ``auto``.

    Args:
        config: one that is sampled with, in training or evaluation.
        hf_configs, cluster: as of ``plan_ledger``.
    """
    if config.rollout.kv_cache_gib != "auto":
        return config
    sizes = {role: sizes_of(values) for role, values in hf_configs.items()}
    if config.stage == "sft":  # its model is evaluated: with the memory of a stage that samples
        planner = _Planner(config.model_copy(update={"stage": "grpo"}), sizes, cluster)
    else:
        planner = _Planner(config, sizes, cluster)
    rollout = config.rollout.model_copy(update={"kv_cache_gib": planner.cache_bytes / GIB})
    return config.model_copy(update={"rollout": rollout})


class _Planner:
    def __init__(self, config: Config, sizes: dict[str, ModelSizes], cluster: Cluster, *, working: bool = True) -> None:
        self.working = working
        self.config, self.sizes, self.cluster = config, sizes, cluster
        self.roles: dict[Role, RoleConfig] = {"actor": config.actor}
        if config.critic is not None:
            self.roles["critic"] = config.critic
        self.samples = config.stage != "sft"
        self.longest = config.data.max_prompt_tokens + config.data.max_response_tokens
        self.layouts = {role: RoleLayout(c.parallel, cluster.world_size) for role, c in self.roles.items()}

    def spec(self, role: RoleConfig) -> Spec:
        if role.layer_spec != "auto":
            return role.layer_spec
        plain = self.cluster.on_cpu or role.dtype == "float32" or role.fp8.emulated
        return "torch" if plain else "te"

    @cached_property
    def peaks(self) -> dict[Role, RolePeaks]:
        return {
            role: RolePeaks(self.sizes[role], role, c, self.spec(c), on_cpu=self.cluster.on_cpu)
            for role, c in self.roles.items()
        }

    @cached_property
    def kv(self) -> KVCache | None:
        if not self.samples:
            return None
        sizes, rollout = self.sizes["actor"], self.config.rollout
        return kv_cache(sizes, rollout, self.longest, self.cache_bytes, on_cpu=self.cluster.on_cpu)

    @cached_property
    def cache_bytes(self) -> int:
        """Of the KV cache, as the settings have it or as there is room."""
        sizes, rollout, room = self.sizes["actor"], self.config.rollout, CPU_CACHE
        if rollout.kv_cache_gib == "auto" and not self.cluster.on_cpu:
            # with the upper ends of what work takes, whoever asks
            room = (self if self.working else _Planner(self.config, self.sizes, self.cluster)).room
        return cache_bytes(sizes, rollout, self.longest, room, on_cpu=self.cluster.on_cpu)

    @property
    def room(self) -> int:
        """Bytes that every phase with a KV cache leaves for it on every rank; below 0: nothing."""
        used = [
            sum(item.bytes.high for item in self._items(name, self.stages(rank), cache=False))
            for name in self._phases
            if self._is_there(name, KV_CACHE)
            for rank in self.ranks
        ]
        return int(FILLED * self.cluster.card.memory) - max(used)

    @cached_property
    def ranks(self) -> list[int]:
        """One rank for each pair of stages that ranks have in the roles' layouts."""
        seen: dict[tuple[int, ...], int] = {}
        shorter = min(layout.per_stage for layout in self.layouts.values())
        for rank in range(0, self.cluster.world_size, shorter):
            seen.setdefault(tuple(layout.place(rank).stage for layout in self.layouts.values()), rank)
        return list(seen.values())

    def stages(self, rank: int) -> dict[Role, int]:
        return {role: layout.place(rank).stage for role, layout in self.layouts.items()}

    def state(self, role: Role, stage: int) -> StateBytes:
        """Of the stage's first rank, whose share of the optimizer's states is a full one."""
        if (role, stage) not in self._states:
            layout = self.layouts[role]
            place = layout.place(stage * layout.per_stage)
            self._states[role, stage] = state_at(self.sizes[role], role, self.roles[role], layout, place)
        return self._states[role, stage]

    def staged(self, role: Role, stage: int) -> Bytes:
        """Of the same rank, which writes those parameters that tensor-parallel ranks have copies of."""
        layout = self.layouts[role]
        return staged_at(self.sizes[role], role, self.roles[role], layout, layout.place(stage * layout.per_stage))

    @cached_property
    def _states(self) -> dict[tuple[Role, int], StateBytes]:
        return {}

    # --- the whole

    def ledger(self) -> Ledger:
        phases = tuple(self._fullest(name) for name in self._phases)
        states: dict[str, StateBytes] = {
            role: max((self.state(role, s) for s in range(self._stages(role))), key=_total) for role in self.roles
        }
        staged: dict[str, Bytes] = {
            role: max((self.staged(role, s) for s in range(self._stages(role))), key=_high) for role in self.roles
        }
        host = host_items(self.config, self.cluster, states, staged, self.layouts["actor"], sampled=self.samples)
        fp8 = [f"{role}.fp8" for role, settings in self.roles.items() if settings.fp8.is_on]
        unmodelled = (*UNMODELLED, *(f"{key}: all is counted as in the role's dtype" for key in fp8))
        return Ledger(self.cluster, phases, tuple(host), self.kv, states, unmodelled)

    def _stages(self, role: Role) -> int:
        return self.roles[role].parallel.pipeline_model_parallel_size

    @property
    def _phases(self) -> list[str]:
        """Their names."""
        return ["load", *(self._sampling_phases() if self.samples else ["m_step"]), "checkpoint"]

    def _sampling_phases(self) -> list[str]:
        method, algorithm = METHODS[self.config.stage], self.config.algorithm
        found = ["rollout"]
        if method.critic and "critic" in self.roles:  # an evaluation may have none
            found += ["values"] + (["e_step"] if algorithm.estep.every is not None else [])
        found += ["log_probs"] * (algorithm.mstep.minibatches > 1) + ["m_step", SYNC]
        return found + ["evaluate"] * bool(self.config.evaluation.sets)

    def _fullest(self, name: str) -> Phase:
        found = []
        for rank in self.ranks:
            stages = self.stages(rank)
            where = ", ".join(f"stage {stages[role]} of {self._stages(role)} ({role})" for role in self.roles)
            found.append(Phase(name, rank, where, tuple(self._items(name, stages))))
        least = min(phase.certain for phase in found)
        return replace(max(found, key=lambda phase: phase.total.high), least=least)

    def _items(self, name: str, stages: dict[Role, int], *, cache: bool = True) -> list[Item]:
        """``cache``: with the KV cache."""
        items = [device_overhead(self.cluster, self.roles.values(), sampled=self.samples)]
        items += self._resident(name, stages, cache=cache)
        saving = name == "checkpoint"
        if self.cluster.on_cpu and self.working and (saving or self.config.checkpoint.asynchronous):
            size = snapshot(self.config, {role: self.staged(role, stages[role]) for role in self.roles})
            # it is written while the next step goes on
            items.append(Item(SNAPSHOT, Bytes(size.low if saving else 0, size.high)))
        items += self._work(name, stages) if self.working else []
        return [item for item in items if item.bytes.high]

    # --- what is resident

    def _resident(self, name: str, stages: dict[Role, int], *, cache: bool) -> list[Item]:
        items = []
        for role in self.roles:
            state = self.state(role, stages[role])
            parts = {"weights": state.weights, "gradients": state.gradients, "optimizer": state.optimizer}
            for part, size in parts.items():
                if self._is_there(name, f"{role}.{part}"):
                    items.append(Item(f"{role}.{part}", Bytes(size, size), exact=True))
        if self.samples:
            weights = rollout_weights(self.sizes["actor"], self.config.rollout)
            if self._is_there(name, ROLLOUT_WEIGHTS):
                # on the CPU linear layers are kept packed, perhaps beside what they were packed of
                items.append(Item(ROLLOUT_WEIGHTS, Bytes(weights, weights * (2 if self.cluster.on_cpu else 1)), True))
            if cache and self.kv is not None and self._is_there(name, KV_CACHE):
                items.append(Item(KV_CACHE, Bytes(self.kv.bytes, self.kv.bytes), exact=True))
        return items

    def _is_there(self, phase: str, part: str) -> bool:
        """By ``loop.residency``: what the phase needs, and what never leaves."""
        residency = self.config.residency
        if part.startswith("rollout."):
            leaves = residency.sleep
        else:
            leaves = residency.offload == "all" or (residency.offload == "optimizer" and not part.endswith(".weights"))
        if not leaves:
            return True
        if phase == "load":  # vLLM is built while the trainers sleep, and engines one after the other
            return part.startswith("rollout.")
        if phase == "checkpoint":  # one role at a time, after the update of vLLM's weights
            return part in {ROLLOUT_WEIGHTS, f"{self._largest}.weights", f"{self._largest}.optimizer"}
        return part in NEEDS[phase]

    @cached_property
    def _largest(self) -> Role:
        """The role whose checkpoint takes more."""
        return max(self.roles, key=lambda role: max(self.state(role, s).total for s in range(self._stages(role))))

    # --- what work takes

    def _work(self, name: str, stages: dict[Role, int]) -> list[Item]:
        sampling = [rollout_workspace(self.sizes["actor"], self.config.rollout, self.cluster)] if self.samples else []
        match name:
            case "rollout":
                return sampling
            case "evaluate":
                critic = [self._activations("critic", stages, forward=True)] if "critic" in self.roles else []
                return [*sampling, *critic]
            case "values" | "log_probs":
                return [self._activations("critic" if name == "values" else "actor", stages, forward=True)]
            case "e_step" | "m_step":
                return [self._activations("critic" if name == "e_step" else "actor", stages, forward=False)]
            case "sync":
                return [Item("buckets of new weights", self._buckets())]
            case "load":  # parameters are made before their buffers, and go when they have moved
                moving = max(self.state(role, stages[role]).weights for role in self.roles)
                return [*sampling, Item("parameters on their way into buffers", Bytes(0, moving))]
            case _:
                return []

    def _activations(self, role: Role, stages: dict[Role, int], *, forward: bool) -> Item:
        """Between packs that are half full (several are more than that on average) and full ones."""

        def peak(share: float, imbalance: float) -> int:
            load = Load(self.longest, share, self._microbatches(role), imbalance)
            peaks: Peaks = self.peaks[role].of_stage(stages[role], load)
            return peaks.forward if forward else peaks.backward

        what = "forward" if forward else "forward and backward"
        return Item(f"{role}: {what} of a micro-batch", Bytes(peak(0.5, 1.0), round(peak(1.0, 1.25) * self._fragments)))

    def _buckets(self) -> Bytes:
        """Two at a time; larger where one module of vLLM's, which is finished as a whole, needs more: all experts of a
        layer, on the CPU every linear layer. It is received while the one before is, packed once, and sent on at most
        once.
        """
        sizes, rollout = self.sizes["actor"], self.config.rollout
        width = ITEMSIZE[rollout.dtype] * sizes.hidden // rollout.tensor_parallel_size
        module = 2 * sizes.intermediate * width if self.cluster.on_cpu else 0
        if sizes.experts:
            module = 3 * sizes.expert_intermediate * sizes.experts * width
        return Bytes(0, max(2 * rollout.bucket_mib << 20, 4 * module))

    @property
    def _fragments(self) -> float:
        return 1.0 if self.cluster.on_cpu else 1.05

    def _microbatches(self, role: Role) -> int:
        """Most of one optimizer step on a shard: responses of full length."""
        data, algorithm = self.config.data, self.config.algorithm
        if self.config.stage == "sft":
            rows = data.sft_batch_size
        else:
            labeled, unlabeled = data.labeled_prompts_per_step, data.unlabeled_prompts_per_step
            prompts = labeled if role == "critic" else labeled + unlabeled
            steps = algorithm.estep.minibatches if role == "critic" else algorithm.mstep.minibatches
            rows = -(-prompts // steps) * self.config.rollout.samples_per_prompt
        shards = self.layouts[role].data_parallel
        tokens = -(-rows // shards) * self.longest
        return max(1, -(-tokens // self.roles[role].max_tokens_per_microbatch))


def _total(state: StateBytes) -> int:
    return state.total


def _high(size: Bytes) -> int:
    return size.high
