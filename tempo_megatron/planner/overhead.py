"""What is not a model's tensor: contexts and libraries, vLLM's workspace, and memory of the host. Mostly assumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tempo_megatron.config.rollout import RolloutConfig
from tempo_megatron.config.schema import Config, RoleConfig
from tempo_megatron.planner.hardware import Cluster
from tempo_megatron.planner.parameters import RoleLayout
from tempo_megatron.planner.range import GIB, Bytes, Item
from tempo_megatron.planner.sizes import ITEMSIZE, ModelSizes
from tempo_megatron.planner.state import StateBytes

MIB = 1 << 20

#: CUDA context with the kernels of torch, Transformer Engine and vLLM, and cuBLAS's workspaces. Assumed.
_CONTEXT = Bytes(int(0.6 * GIB), int(1.5 * GIB))
#: NCCL's buffers of one group of several ranks. Assumed.
_GROUP = Bytes(16 * MIB, 200 * MIB)
#: torch, Megatron and vLLM imported, shared by the ranks of a node that are forked, and what each has of its own.
#: The first is docs/design.md's figure, the second was seen in runs of the demo on the CPU.
_IMPORTS_SHARED, _IMPORTS_OWN = int(0.6 * GIB), int(0.3 * GIB)
#: CUDA graphs of vLLM's decode steps. Assumed.
_GRAPHS = Bytes(int(0.3 * GIB), int(1.5 * GIB))
#: Host memory of a process with CUDA's libraries. Assumed.
_HOST_PROCESS = Bytes(int(1.5 * GIB), 4 * GIB)
#: A verifier's worker: its imports; more while it checks. Assumed.
_WORKER = Bytes(80 * MIB, 400 * MIB)
#: Bytes of a response token, docs/design.md: on its shard's ranks; where it was sampled, as Python's numbers at most.
_TOKEN_HELD, _TOKEN_SAMPLED = 28, 80
#: The item of what ``snapshot`` counts.
SNAPSHOT = "snapshot of a checkpoint"


def device_overhead(cluster: Cluster, roles: Iterable[RoleConfig], *, sampled: bool) -> Item:
    """Beside all tensors."""
    if cluster.on_cpu:
        shared = _IMPORTS_SHARED // cluster.ranks_per_node
        return Item("imported libraries", Bytes(shared, shared + _IMPORTS_OWN + _IMPORTS_SHARED // 4))
    groups = 2 * int(sampled) + sum(
        sum(size > 1 for size in role.parallel.model_dump(exclude={"sequence_parallel"}).values() if size) + 1
        for role in roles
    )
    low, high = _CONTEXT.low + groups * _GROUP.low, _CONTEXT.high + groups * _GROUP.high
    return Item("CUDA context and NCCL", Bytes(low, high))


def rollout_workspace(sizes: ModelSizes, config: RolloutConfig, cluster: Cluster) -> Item:
    """A step of ``max_num_batched_tokens``: residual, projections, MLP; logits of each sequence in float32."""
    tensor, width = config.tensor_parallel_size, ITEMSIZE[config.dtype]
    f = sizes.experts_per_token * sizes.expert_intermediate if sizes.experts else sizes.intermediate
    token = width * (3 * sizes.hidden + 2 * (sizes.q + 2 * sizes.kv) // tensor + 3 * f // tensor)
    logits = 4 * sizes.vocab * config.max_num_seqs
    low = config.max_num_batched_tokens * width * sizes.hidden
    high = config.max_num_batched_tokens * token + 4 * logits
    if cluster.on_cpu:
        return Item("vLLM: a step", Bytes(0, high))
    return Item("vLLM: a step, CUDA graphs", Bytes(low + _GRAPHS.low, high + _GRAPHS.high))


def host_items(
    config: Config,
    cluster: Cluster,
    states: Mapping[str, StateBytes],
    staged: Mapping[str, Bytes],
    layout: RoleLayout,
    *,
    sampled: bool,
) -> list[Item]:
    """Memory of one node beside its devices; on the CPU, where these are the same, what is not counted there.

    Args:
        states, staged: by role, of its fullest stage.
        layout: of the actor.
    """
    ranks = cluster.ranks_per_node
    items = []
    if not cluster.on_cpu:
        items.append(Item("processes", _times(_HOST_PROCESS, ranks)))
        items += _offloaded(config, states, ranks)
        items.append(Item(SNAPSHOT, _times(snapshot(config, staged), ranks)))
    if sampled:
        workers = max(config.verifier.workers, -(-ranks // config.rollout.tensor_parallel_size))
        items.append(Item("verifier's workers", _times(_WORKER, workers)))
        items.append(_rollouts(config, cluster, layout))
    return items


def _offloaded(config: Config, states: Mapping[str, StateBytes], ranks: int) -> list[Item]:
    """Pinned memory, of which torch takes powers of two."""
    if config.residency.offload == "none":
        return []
    items = []
    for role, state in states.items():
        parts = {"optimizer": state.optimizer} | (
            {"weights": state.weights} if config.residency.offload == "all" else {}
        )
        for part, size in parts.items():
            if size:
                pinned = ranks * (1 << (size - 1).bit_length())
                items.append(Item(f"{role}.{part}, away (pinned)", Bytes(pinned, pinned), exact=True))
    return items


def snapshot(config: Config, staged: Mapping[str, Bytes]) -> Bytes:
    """What a rank's part of a checkpoint is written from (``state.staged_at``): of all roles while training goes on, or
    of one after the other.
    """
    if config.checkpoint.asynchronous:
        return sum(staged.values(), Bytes(0, 0))
    return max(staged.values(), key=lambda size: size.high)


def _rollouts(config: Config, cluster: Cluster, layout: RoleLayout) -> Item:
    """Tokens of a step's responses, on the ranks of a node: those of its shards and those that it sampled."""
    prompts = config.data.labeled_prompts_per_step + config.data.unlabeled_prompts_per_step
    tokens = prompts * config.rollout.samples_per_prompt * config.data.max_response_tokens
    held = tokens * _TOKEN_HELD // layout.data_parallel * cluster.ranks_per_node
    sampled = tokens * _TOKEN_SAMPLED // cluster.nodes
    return Item("responses of a step", Bytes(0, held + sampled))


def _times(size: Bytes, count: int) -> Bytes:
    return Bytes(size.low * count, size.high * count)
