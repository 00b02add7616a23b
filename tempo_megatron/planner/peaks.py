"""Peaks of a role's engine on each pipeline stage, of full micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from tempo_megatron.config.schema import RoleConfig
from tempo_megatron.planner.activations import Chunk, ChunkBytes, ChunkRun, chunks_of_stage
from tempo_megatron.planner.layers import Pack, Spec
from tempo_megatron.planner.parameters import Role
from tempo_megatron.planner.schedule import Peaks, stage_peaks
from tempo_megatron.planner.sizes import ITEMSIZE, ModelSizes

#: Tokens of the busiest expert-parallel rank, of those of an even share.
IMBALANCE = 1.25


@dataclass(frozen=True)
class Load:
    """What a role's micro-batches are.

    Attributes:
        longest: tokens of the longest sequence.
        share: tokens of a micro-batch, of ``max_tokens_per_microbatch``.
        microbatches: of one optimizer step and data-parallel shard.
        imbalance: see ``IMBALANCE``.
    """

    longest: int
    share: float = 1.0
    microbatches: int = 1 << 20
    imbalance: float = IMBALANCE


class RolePeaks:
    """Of one role; chunks that are alike are gone through once."""

    def __init__(self, sizes: ModelSizes, name: Role, role: RoleConfig, spec: Spec, *, on_cpu: bool) -> None:
        self._sizes, self._name, self._role, self._spec, self._on_cpu = sizes, name, role, spec, on_cpu
        self._chunk = cache(self._measured)

    def of_stage(self, stage: int, load: Load) -> Peaks:
        pack = self.pack(load)
        chunks = [self._chunk(chunk, pack) for chunk in chunks_of_stage(self._sizes, self._role, stage)]
        parallel = self._role.parallel
        cut = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        message = ITEMSIZE[self._role.dtype] * pack.tokens * self._sizes.hidden // cut
        multiple = parallel.pipeline_model_parallel_size if len(chunks) > 1 else 1
        microbatches = -(-min(load.microbatches, 8 * len(chunks) * parallel.pipeline_model_parallel_size) // multiple)
        return stage_peaks(chunks, parallel, stage, max(1, microbatches * multiple), message)

    def pack(self, load: Load) -> Pack:
        """As a context rank sees it: sequences of full length, and a rest."""
        parallel = self._role.parallel
        context = parallel.context_parallel_size
        unit = 2 * context if context > 1 else 1
        align = unit * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
        align *= self._role.fp8.multiple
        tokens = -(-max(align, int(self._role.max_tokens_per_microbatch * load.share)) // align) * align
        longest = min(-(-load.longest // unit) * unit, tokens)
        count, rest = divmod(tokens, longest)
        lengths = [(longest, count)] + ([(-(-rest // unit) * unit, 1)] if rest else [])
        return Pack(tokens // context, tuple(lengths), load.imbalance)

    def _measured(self, chunk: Chunk, pack: Pack) -> ChunkBytes:
        run = ChunkRun(self._sizes, self._name, self._role, self._spec, chunk, pack, self._on_cpu)
        return run.measure()
