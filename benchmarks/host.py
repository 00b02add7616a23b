"""What the host does for each token: responses to one batch on every rank, and rows to packed micro-batches.

Sampling costs nothing here: the engine has its responses ready. Two sizes; the same time and memory a token at both
is what linear means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import Comparison, Contender, Prepare, Run, Spread, compare, started
from benchmarks.report import Figure, Options, Report, ahead_of
from benchmarks.worlds import join_world, long_tail

PROMPT, SAMPLES, MEAN, BUDGET = 64, 8, 512, 8192


def run(options: Options) -> Report:
    tokens = (4_096, 16_384) if options.small else (250_000, 2_000_000)
    parts = {"rollout": ("responses to a batch, 2 ranks", 2), "pack": ("a batch to micro-batches", 1)}
    comparisons, figures = [], []
    for part, (what, ranks) in parts.items():
        sizes = [
            Contender(f"{count} tokens", f"benchmarks.host:{part}", {"tokens": count, "seed": 0}, ranks=ranks)
            for count in reversed(tokens)
        ]
        with started(sizes) as running:
            comparison = compare(what, {}, running, options.rounds)
        comparisons.append(comparison)
        figures += _figures(comparison, what)
        figures += ahead_of(
            comparison, sizes[1].name, f"{what}: speed at {tokens[1]} against {tokens[0]} tokens", ">= 0.8"
        )
    about = (
        "Nanoseconds and bytes that the host spends on each token around sampling and training; peak, not what stays."
    )
    return Report("host", about, comparisons, figures)


def _figures(comparison: Comparison, what: str) -> list[Figure]:
    line = comparison.lines[0]
    if line.speed is None:
        return []
    figures = [Figure(f"{what}: time a token", line.speed.inverse(1e9), "ns")]
    if line.extra_bytes is not None:
        each = line.extra_bytes / line.facts["work"]
        figures.append(Figure(f"{what}: peak memory a token, of a rank", Spread(each, each, each), "bytes"))
    return figures


# ---------------------------------------------------------------- contenders


def rollout(settings: dict[str, Any]) -> Prepare:
    """``rollout.collect.rollout`` over all ranks, with responses that are there already."""
    join_world(settings["threads"])
    import torch.distributed as dist

    from tempo_megatron.rollout.collect import rollout as collect
    from tempo_megatron.rollout.engine import GenerationRequest, ReadResponses, SampledResponse
    from tempo_megatron.rollout.prompts import PromptDraw

    lengths = _lengths(settings["tokens"], settings["seed"])
    draws = [PromptDraw(str(i), list(range(PROMPT)), True, i * SAMPLES) for i in range(len(lengths) // SAMPLES)]
    ready = [SampledResponse(list(range(n)), [-0.5] * n, "stop") for n in lengths]

    class Ready:
        """Stands where the engine does: responses by seed."""

        num_replicas, replica_index, is_replica_leader = dist.get_world_size(), dist.get_rank(), True
        max_model_len, max_num_seqs = PROMPT + 4 * MEAN + 1, len(lengths)

        def generate_drawn(
            self,
            requests: Sequence[GenerationRequest],
            version: int,
            draw: Callable[[], int | None],
            on_finished: Callable[[int, ReadResponses], None],
        ) -> None:
            for index in iter(draw, None):
                on_finished(index, partial(self._responses, requests[index].seed))

        def _responses(self, seed: int) -> list[SampledResponse]:
            return ready[seed : seed + SAMPLES]

        as_leader_says = None  # all prompts are dealt

    engine: Any = Ready()

    def prepare(case: dict[str, Any]) -> Run:
        def measured() -> dict[str, Any]:
            batch = collect(
                engine,
                draws,
                samples_per_prompt=SAMPLES,
                max_response_tokens=4 * MEAN,
                version=0,
                decode=lambda ids: ["x" * len(i) for i in ids],
            )
            return {"work": int(batch.response_lengths.sum())}

        return measured

    return prepare


def pack(settings: dict[str, Any]) -> Prepare:
    """``training.microbatch.make_microbatches`` on one rank."""
    join_world(settings["threads"])
    from tempo_megatron.training.microbatch import Sequences, make_microbatches

    lengths = _lengths(settings["tokens"], settings["seed"])
    responses = [list(range(n)) for n in lengths]
    prompts = [list(range(PROMPT)) for _ in lengths]

    def prepare(case: dict[str, Any]) -> Run:
        sequences = Sequences.of(prompts, responses)
        homes = sequences.dealt(1, 1)

        def measured() -> dict[str, Any]:
            made = make_microbatches(sequences, homes, BUDGET, (0, 1), (0, 1), align=1, multiple=1, equal_lengths=False)
            return {"work": sum(lengths), "microbatches": sum(1 for _ in made)}

        return measured

    return prepare


def _lengths(tokens: int, seed: int) -> list[int]:
    """Lengths of responses of a long tail, about ``tokens`` together, a whole number of prompts."""
    return long_tail(tokens // MEAN // SAMPLES * SAMPLES, MEAN, seed)
