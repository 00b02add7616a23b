"""Bytes of a vLLM replica's weights and KV cache on one rank, and how many sequences the cache has room for.

Sources (vLLM 0.32): v1/core/kv_cache_utils.py (``_get_kv_cache_groups_uniform_page_size``, ``num_blocks = memory //
bytes_per_block``), v1/kv_cache_interface.py (pages; what a sliding window holds), model_executor/layers/
vocab_parallel_embedding.py (padded vocabularies), layers/linear.py (KV heads that are copied).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tempo_megatron.config.rollout import RolloutConfig
from tempo_megatron.planner.sizes import ITEMSIZE, ModelSizes

#: Tokens of a block: what ``rollout.engine`` asks for on the CPU, vLLM's default on a GPU.
CPU_BLOCK, CUDA_BLOCK = 32, 16
#: Rows and columns of a block in FP8: ``numerics.fp8.BLOCK``, which is not asked: a plan loads no torch.
FP8_BLOCK = 128
#: Rows of an embedding are padded to a multiple of it before they are cut.
_VOCAB_PADDING = 64
#: From here on groups are as large as the larger kind of layers.
_NEARLY_EQUAL = 1.5


@dataclass(frozen=True)
class KVCache:
    """Of one rank.

    Attributes:
        blocks: of ``block`` tokens each, one of which vLLM keeps for itself.
        bytes: of all blocks.
        bytes_per_block: of one, in all layers of a group.
        sequence_blocks: that a sequence of full length takes.
        sequences: of full length that fit at once.
    """

    block: int
    blocks: int
    bytes: int
    bytes_per_block: int
    sequence_blocks: int

    @property
    def sequences(self) -> float:
        return max(0, self.blocks - 1) / self.sequence_blocks

    @property
    def needed_bytes(self) -> int:
        """Smallest ``rollout.kv_cache_gib``, in bytes, in which one sequence of full length fits."""
        return self.bytes_for(1)

    def bytes_for(self, sequences: int) -> int:
        """Smallest cache for so many sequences of full length at once."""
        return (sequences * self.sequence_blocks + 1) * self.bytes_per_block


def kv_cache(sizes: ModelSizes, config: RolloutConfig, longest: int, memory: int, *, on_cpu: bool) -> KVCache:
    """The cache that vLLM makes of ``memory`` bytes for sequences of at most ``longest`` tokens."""
    block = CPU_BLOCK if on_cpu else CUDA_BLOCK
    heads = max(1, sizes.kv_heads // config.tensor_parallel_size)
    page = 2 * block * heads * sizes.head_dim * ITEMSIZE[config.dtype]
    kinds = Counter(sizes.windows)
    layers = _group_size(list(kinds.values()))
    in_flight = max(config.max_num_batched_tokens, longest) if on_cpu else config.max_num_batched_tokens
    sequence = 0
    for window, count in kinds.items():
        held = longest if window is None else min(window - 1 + in_flight, longest)
        sequence += -(-count // layers) * (-(-held // block) + (window is not None))
    blocks = memory // (page * layers)
    return KVCache(block, blocks, blocks * page * layers, page * layers, sequence)


def cache_bytes(sizes: ModelSizes, config: RolloutConfig, longest: int, room: int, *, on_cpu: bool) -> int:
    """``rollout.kv_cache_gib`` in bytes; ``auto``: what ``max_num_seqs`` sequences of ``longest`` tokens take, at most
    ``room``, but enough for one.
    """
    if config.kv_cache_gib != "auto":
        return config.kv_cache_bytes
    unit = kv_cache(sizes, config, longest, 0, on_cpu=on_cpu)
    return max(unit.needed_bytes, min(unit.bytes_for(config.max_num_seqs), room))


def _group_size(counts: list[int]) -> int:
    """Layers that share a block table; those of each kind of attention are put in groups of so many."""
    return max(counts) if max(counts) < min(counts) * _NEARLY_EQUAL else min(counts)


def rollout_weights(sizes: ModelSizes, config: RolloutConfig) -> int:
    """Bytes of vLLM's parameters on one rank of a replica, as its loader fills them.

    With ``weights: fp8`` a layer's matrices take a byte a weight, and four for each block's scale.
    """
    size, hidden = config.tensor_parallel_size, sizes.hidden
    vocab = -(-sizes.vocab // _VOCAB_PADDING) * _VOCAB_PADDING // size * hidden
    kv = max(1, sizes.kv_heads // size) * sizes.head_dim
    matrices, layer = hidden * (2 * sizes.q // size + 2 * kv), 2 * hidden
    if sizes.qkv_bias:
        layer += sizes.q // size + 2 * kv
    if sizes.head_norm:
        layer += 2 * sizes.head_dim
    elif sizes.projection_norm:
        layer += sizes.q + sizes.kv  # vLLM cuts the heads, not their norm
    if sizes.experts:
        layer += sizes.mlp_parameters(0)
        matrices += 3 * hidden * sizes.expert_intermediate * sizes.experts // size
    else:
        matrices += 3 * hidden * sizes.intermediate // size
    item = ITEMSIZE[config.dtype]
    in_layers = matrices * (1 + 4 / FP8_BLOCK**2) if config.weights == "fp8" else matrices * item
    return item * (vocab * (1 if sizes.tied else 2) + sizes.layers * layer + hidden) + round(sizes.layers * in_layers)
