"""Micro-batches through the chunks of a stage: how many are between forward and backward at a time, and the peaks.

Source: megatron/core/pipeline_parallel/schedules.py (``forward_backward_no_pipelining``, 1F1B, and the interleaved
schedule with groups of as many micro-batches as there are stages).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.planner.activations import ChunkBytes

#: Small tensors that are not counted one by one: three hundredths.
UNCOUNTED = 1.03


@dataclass(frozen=True)
class Peaks:
    """Bytes above what a stage's rank holds anyway.

    Attributes:
        forward: of a forward without gradients.
        backward: of forward and backward.
        kept: of them, what micro-batches keep for their backward when most of them do.
    """

    forward: int
    backward: int
    kept: int


def stage_peaks(
    chunks: Sequence[ChunkBytes], parallel: ParallelConfig, stage: int, microbatches: int, message: int
) -> Peaks:
    """Of equal micro-batches.

    Args:
        chunks: of the stage, in their order.
        message: bytes of what a micro-batch hands to the next stage; some of them, received, sent and done with, are
            there beside the micro-batches that are counted.
    """
    stages = parallel.pipeline_model_parallel_size
    alone, both = (0, 0) if stages == 1 else (1, 2) if len(chunks) == 1 else (3, 4)
    live = most = kept = 0
    for chunk, is_forward in steps(len(chunks), stages, stage, microbatches):
        size = chunks[chunk]
        if is_forward:
            most = max(most, live + size.forward)
            live += size.kept
            kept = max(kept, live)
        else:
            live -= size.kept
            most = max(most, live + size.backward)
    forward = max(size.forward_only for size in chunks)
    return Peaks(round((forward + alone * message) * UNCOUNTED), round((most + both * message) * UNCOUNTED), kept)


def steps(chunks: int, stages: int, stage: int, microbatches: int) -> list[tuple[int, bool]]:
    """(chunk, is it a forward) in the order in which a stage does them."""
    if chunks == 1:
        forwards, ahead = [0] * microbatches, stages - stage - 1
    else:
        groups = -(-microbatches // stages)
        forwards = [chunk for _ in range(groups) for chunk in range(chunks) for _ in range(stages)]
        ahead = 2 * (stages - stage - 1) + (chunks - 1) * stages
    backwards = [chunks - 1 - chunk for chunk in forwards]
    ahead = min(ahead, len(forwards))
    order = [(chunk, True) for chunk in forwards[:ahead]]
    for chunk, back in zip(forwards[ahead:], backwards, strict=False):
        order += [(chunk, True), (back, False)]
    return order + [(chunk, False) for chunk in backwards[len(forwards) - ahead :]]
