"""Operations and bytes of a step's phases, and the seconds that they take at stated rates.

A matrix product of a token with n parameters is 2 n operations; the attention of a token to c others 4 q c in each
layer, where q is the width of all queries; a backward twice its forward. What is counted besides is said where it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tempo_megatron.config.methods import METHODS
from tempo_megatron.config.schema import Config, RoleConfig
from tempo_megatron.planner.hardware import EFFICIENCY, Cluster
from tempo_megatron.planner.parameters import RoleLayout
from tempo_megatron.planner.rollout import kv_cache, rollout_weights
from tempo_megatron.planner.sizes import ITEMSIZE, ModelSizes
from tempo_megatron.planner.state import StateBytes

#: Mean lengths, of the longest, where nothing else is said.
PROMPT_SHARE, RESPONSE_SHARE = 0.25, 0.5
#: Seconds that a collective of a decode step takes beside its bytes. Assumed.
LATENCY = 15e-6


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of a response."""

    prompt: float
    response: float

    @classmethod
    def of(cls, config: Config, prompt: float | None = None, response: float | None = None) -> Lengths:
        data = config.data
        return cls(
            prompt or PROMPT_SHARE * data.max_prompt_tokens, response or RESPONSE_SHARE * data.max_response_tokens
        )

    @property
    def total(self) -> float:
        return self.prompt + self.response


@dataclass(frozen=True)
class PhaseWork:
    """One phase of a step, of the whole job.

    Attributes:
        tokens: that go through it.
        flops: operations on them.
        bytes: that each rank reads from its memory or sends, where these and not operations take the time.
        seconds: at the assumed rates.
    """

    name: str
    tokens: float
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class StepWork:
    """A step's phases, one after the other."""

    phases: tuple[PhaseWork, ...]
    sampled: float
    world_size: int

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def tokens_per_second_and_rank(self) -> float:
        """Response tokens of a step, by its time and the ranks."""
        return self.sampled / self.seconds / self.world_size


def forward_flops(sizes: ModelSizes, lengths: Lengths, *, output: float = 0.0) -> float:
    """Of one sequence; ``output``: tokens whose logits are made."""
    tokens = lengths.total
    attention = sum(4 * sizes.q * _context(tokens, window) * tokens for window in sizes.windows)
    return 2 * sizes.active_parameters * tokens + attention + 2 * sizes.hidden * sizes.vocab * output


def _context(tokens: float, window: int | None) -> float:
    """Mean number of tokens that one attends to."""
    if window is None or window >= tokens:
        return tokens / 2
    return window - window * window / (2 * tokens)


def step_work(
    config: Config,
    sizes: Mapping[str, ModelSizes],
    cluster: Cluster,
    states: Mapping[str, StateBytes],
    lengths: Lengths,
    cache: int,
) -> StepWork:
    """Of one step (of one optimizer step in stage sft).

    Args:
        states: by role, of its fullest stage.
        cache: bytes of a rank's KV cache.
    """
    return _Step(config, sizes, cluster, states, lengths, cache).work()


class _Step:
    def __init__(
        self,
        config: Config,
        sizes: Mapping[str, ModelSizes],
        cluster: Cluster,
        states: Mapping[str, StateBytes],
        lengths: Lengths,
        cache: int,
    ) -> None:
        self.config, self.sizes, self.cluster, self.states, self.lengths = config, sizes, cluster, states, lengths
        self.cache = cache
        data, method = config.data, METHODS.get(config.stage)
        self.method = method
        samples = config.rollout.samples_per_prompt
        self.labeled = data.labeled_prompts_per_step * samples
        self.rows = self.labeled + data.unlabeled_prompts_per_step * samples
        both = method is None or not method.unlabeled or config.algorithm.mstep.rows == "all"
        self.policy_rows = self.rows if both else self.rows - self.labeled

    def work(self) -> StepWork:
        if self.method is None:
            rows = self.config.data.sft_batch_size
            return StepWork((self._trained("m_step", "actor", rows, 1, 1),), rows * self.lengths.response, self._world)
        algorithm, phases = self.config.algorithm, self._sampled()
        if self.method.critic:
            estep = algorithm.estep
            before = self.labeled if estep.minibatches > 1 or estep.value_clip is not None else 0
            phases.append(self._forward("values", "critic", self.policy_rows + before))
            if estep.every is not None:
                phases.append(self._trained("e_step", "critic", self.labeled, estep.updates, estep.minibatches))
        mstep = algorithm.mstep
        if mstep.minibatches > 1:
            phases.append(self._forward("log_probs", "actor", self.policy_rows))
        phases.append(self._trained("m_step", "actor", self.policy_rows, 1, mstep.minibatches))
        phases.append(self._sync())
        if moved := self._moves():
            phases.append(moved)
        return StepWork(tuple(phases), self.rows * self.lengths.response, self._world)

    @property
    def _world(self) -> int:
        return self.cluster.world_size

    def _rate(self, dtype: str) -> float:
        card = self.cluster.card
        return card.bf16 if dtype == "bfloat16" else card.fp32

    def _role(self, name: str) -> RoleConfig:
        role = self.config.actor if name == "actor" else self.config.critic
        assert role is not None
        return role

    # --- sampling

    def _sampled(self) -> list[PhaseWork]:
        """Prompts once each (their samples share them), then a token of every running sequence at a time."""
        sizes, rollout, lengths = self.sizes["actor"], self.config.rollout, self.lengths
        prompts = self.rows / rollout.samples_per_prompt
        rate = self._rate(rollout.dtype) * EFFICIENCY["prefill"] * self._world
        flops = prompts * forward_flops(sizes, Lengths(lengths.prompt, 0), output=1)
        prefill = PhaseWork("rollout: prompts", prompts * lengths.prompt, flops, 0.0, flops / rate)
        return [prefill, self._decoded()]

    def _decoded(self) -> PhaseWork:
        sizes, rollout, lengths = self.sizes["actor"], self.config.rollout, self.lengths
        replicas = self._world / rollout.tensor_parallel_size
        rows = self.rows / replicas
        width = ITEMSIZE[rollout.dtype]
        kv_token = 2 * width * max(1, sizes.kv_heads // rollout.tensor_parallel_size) * sizes.head_dim
        held = sum(kv_token * min(lengths.prompt + lengths.response / 2, w or float("inf")) for w in sizes.windows)
        cache = kv_cache(sizes, rollout, round(lengths.total), self.cache, on_cpu=self.cluster.on_cpu)
        running = max(1.0, min(rows, rollout.max_num_seqs, cache.sequences))
        weights = rollout_weights(sizes, rollout) * self._read_share(running)
        rounds = max(rows * lengths.response / running, lengths.response)
        whole = Lengths(lengths.prompt, lengths.response)
        flops = self.rows * (
            forward_flops(sizes, whole, output=lengths.response) - forward_flops(sizes, Lengths(lengths.prompt, 0))
        )
        read = weights + running * held
        by_bytes = read / (self.cluster.card.bandwidth * EFFICIENCY["decode"])
        by_flops = flops / self._world / rounds / (self._rate(rollout.dtype) * EFFICIENCY["prefill"])
        waits = 2 * sizes.layers * LATENCY if rollout.tensor_parallel_size > 1 else 0.0
        seconds = rounds * (max(by_bytes, by_flops) + waits)
        return PhaseWork("rollout: responses", self.rows * lengths.response, flops, rounds * read, seconds)

    def _read_share(self, running: float) -> float:
        """Of vLLM's weights, what a step of so many tokens reads: experts that none of them chose are not."""
        sizes = self.sizes["actor"]
        if not sizes.experts:
            return 1.0
        missed = (1 - sizes.experts_per_token / sizes.experts) ** running
        experts = sizes.mlp_parameters(sizes.experts) / sizes.layer_parameters
        return 1.0 - experts * missed

    # --- training

    def _forward(self, name: str, role: str, rows: float) -> PhaseWork:
        flops = rows * self._forward_flops(role)
        return PhaseWork(name, rows * self.lengths.total, flops, 0.0, self._seconds(role, flops, rows, 1, 1))

    def _forward_flops(self, role: str) -> float:
        return forward_flops(self.sizes[role], self.lengths, output=self.lengths.response if role == "actor" else 0.0)

    def _trained(self, name: str, role: str, rows: float, passes: int, steps: int) -> PhaseWork:
        """Forward, backward, what is made again, and the optimizer's steps with their gradients' reduction."""
        sizes, lengths, config = self.sizes[role], self.lengths, self._role(role)
        layers = forward_flops(sizes, lengths)
        logits = self._forward_flops(role) - layers
        again = {"none": 0.0, "selective": 2 * sizes.layers * sizes.mlp_parameters(sizes.experts_per_token)}
        remade = again.get(config.recompute, layers / lengths.total) * lengths.total
        flops = passes * rows * (3 * layers + remade + 4 * logits)
        forwards = 4 if config.recompute == "full" else 3
        seconds = self._seconds(role, flops, rows * passes / steps, steps, forwards)
        seconds += steps * passes * self._reduced(role)
        return PhaseWork(name, passes * rows * lengths.total, flops, 0.0, seconds)

    def _seconds(self, role: str, flops: float, rows: float, steps: int, passes: int) -> float:
        """With the stages that wait for their first micro-batch, and ranks without a row."""
        config = self._role(role)
        parallel = config.parallel
        layout = RoleLayout(parallel, self._world)
        per_shard = max(1.0, rows / layout.data_parallel)
        microbatches = max(1.0, per_shard * self.lengths.total / config.max_tokens_per_microbatch)
        stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
        bubble = 1 + (stages - 1) / (chunks * microbatches)
        idle = max(1.0, layout.data_parallel / rows)
        products = flops / (self._world * self._rate(config.dtype) * EFFICIENCY["train"])
        return (products + self._exchanged(role, rows * steps * self.lengths.total, passes)) * bubble * idle

    def _exchanged(self, role: str, tokens: float, passes: int) -> float:
        """Seconds of the messages inside of layers, as if nothing was computed meanwhile.

        Args:
            passes: forwards, backwards (two each) and forwards that are made again.
        """
        sizes, config = self.sizes[role], self._role(role)
        parallel, card = config.parallel, self.cluster.card
        layout = RoleLayout(parallel, self._world)
        tensor, context, experts = (
            parallel.tensor_model_parallel_size,
            parallel.context_parallel_size,
            parallel.expert_model_parallel_size,
        )
        width = ITEMSIZE[config.dtype]
        own = tokens / (layout.data_parallel * context)  # of a rank, which its tensor ranks share
        layers = sizes.layers / parallel.pipeline_model_parallel_size

        def seconds(numbers: float, ranks: int, reach: int) -> float:
            link = card.link if reach <= self.cluster.ranks_per_node else card.network
            return layers * width * numbers * (1 - 1 / ranks) / (link * EFFICIENCY["link"])

        found = seconds(4 * own * sizes.hidden, tensor, tensor)  # gathered and scattered, at attention and MLP
        found += seconds(2 * own * context * sizes.kv / tensor, context, tensor * context)
        chosen = 2 * own / tensor * sizes.experts_per_token * sizes.hidden  # there and back
        found += seconds(chosen, experts, parallel.expert_tensor_parallel_size * experts)
        return passes * found

    def _reduced(self, role: str) -> float:
        """Gradients over the replicas and parameters back, and what the optimizer reads and writes."""
        state, config = self.states[role], self._role(role)
        replicas = RoleLayout(config.parallel, self._world).replicas
        card = self.cluster.card
        link = card.link if self.cluster.nodes == 1 else card.network
        sent = (state.gradients + state.weights) * (1 - 1 / replicas)
        return sent / (link * EFFICIENCY["link"]) + 2 * (state.optimizer + state.gradients / replicas) / card.bandwidth

    def _sync(self) -> PhaseWork:
        """As if no rank had any of the weights that it takes."""
        size = rollout_weights(self.sizes["actor"], self.config.rollout)
        card = self.cluster.card
        link = card.link if self.cluster.nodes == 1 else card.network
        return PhaseWork("sync", 0.0, 0.0, size, size / (link * EFFICIENCY["link"]) + 2 * size / card.bandwidth)

    def _moves(self) -> PhaseWork | None:
        """What leaves for the host and comes back; vLLM's weights come with the sync."""
        residency = self.config.residency
        if residency.offload == "none":
            return None
        size = sum(s.optimizer + (s.weights if residency.offload == "all" else 0) for s in self.states.values())
        return PhaseWork("move", 0.0, 0.0, 2 * size, 2 * size / (self.cluster.card.host * EFFICIENCY["host"]))
