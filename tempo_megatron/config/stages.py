"""How many layers each pipeline stage holds. Knows no torch."""

from __future__ import annotations

from tempo_megatron.config.schema import ParallelConfig


def stage_sizes(layers: int, layout: ParallelConfig) -> list[int]:
    """Layers of each stage: those that the layout says, the others as even as can be.

    What is left over goes to the stages in the middle first, for the first one has the embedding as well and the last
    one the output layer.  Numbers that leave a stage without a layer are for ``check_layout`` to refuse.
    """
    stages = layout.pipeline_model_parallel_size
    said = {0: layout.num_layers_in_first_pipeline_stage, stages - 1: layout.num_layers_in_last_pipeline_stage}
    sizes = {stage: size for stage, size in said.items() if size is not None}
    others = sorted(set(range(stages)) - sizes.keys(), key=lambda stage: (stage == stages - 1, stage == 0, stage))
    left = layers - sum(sizes.values())
    for place, stage in enumerate(others):
        sizes[stage] = left // len(others) + (place < left % len(others))
    return [sizes[stage] for stage in range(stages)]


def chunk_sizes(layers: int, layout: ParallelConfig) -> list[int]:
    """Layers of each run of layers in the model's order: chunk 0 of every stage, chunk 1 of every stage, ..."""
    chunks = layout.virtual_pipeline_model_parallel_size
    stages = stage_sizes(layers, layout)
    return [size // chunks + (chunk < size % chunks) for chunk in range(chunks) for size in stages]
