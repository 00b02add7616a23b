"""Sample the evaluation sets, let the verifier process score them, and judge policy and critic."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tempo_megatron.algorithm.diagnostics import calibration
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import Rollouts
from tempo_megatron.errors import RunError
from tempo_megatron.evaluation.bootstrap import PromptBootstrap
from tempo_megatron.evaluation.change import PromptOutcomes
from tempo_megatron.evaluation.metrics import prompt_scores
from tempo_megatron.evaluation.samples import Floats, Ints, Samples, number_answers
from tempo_megatron.loop.batching import terminal_values
from tempo_megatron.loop.collect import decoder, prompt_opening
from tempo_megatron.loop.data import EvalPrompts, PromptData
from tempo_megatron.loop.placement import Homes
from tempo_megatron.loop.runtime import Runtime
from tempo_megatron.loop.verification import Opening, judged_texts
from tempo_megatron.parallel.distributed import gather_objects, on_all_ranks
from tempo_megatron.parallel.exchange import move_rows, to_rank0
from tempo_megatron.rollout.collect import rollout
from tempo_megatron.rollout.engine import RolloutEngine
from tempo_megatron.rollout.expected import ExpectedLengths
from tempo_megatron.rollout.prompts import PromptDraw
from tempo_megatron.rollout.sampling import sample_seed
from tempo_megatron.telemetry.run_folder import LoggedRollout
from tempo_megatron.training.microbatch import Sequences
from tempo_megatron.verifiers.service import VerifierService
from tempo_megatron.verifiers.verdict import Clustered, Verdict

#: Figures that a training record gives per source and with their intervals.
HEADLINES = ("mean@", "pass@", "maj@")


@dataclass(frozen=True)
class EvaluatedSet:
    """Every sample of one set: ``P * n`` rows, the n samples of a prompt together.

    Attributes:
        logged: on rank 0 the token ids and the values of the rows that are logged; None without a critic.
        samples: the outcomes in the form that the figures read.
    """

    batch: Rollouts
    verdicts: list[Verdict]
    logged: tuple[Ragged, Ragged] | None
    samples: Samples


class _Hearing:
    """Asks about every prompt of a set as soon as its samples are there, on the rank that has them."""

    def __init__(self, prompts: EvalPrompts, verifier: VerifierService | None, opening: Opening) -> None:
        self._prompts, self._verifier, self._opening = prompts, verifier, opening
        self._asked: dict[int, tuple[Future[list[Verdict]], Future[list[list[Clustered]]]]] = {}

    def hear(self, position: int, texts: list[str]) -> None:
        """The samples of the prompt at ``position``; in any thread."""
        assert self._verifier is not None
        record, ids = self._prompts.records[position], self._prompts.token_ids[position]
        judged = judged_texts(self._opening, ids, texts)
        items = [(record.id, text) for text in judged]
        self._asked[position] = (
            self._verifier.score_records_later(self._prompts.settings.name, items),
            self._verifier.cluster_later([(record.answer_type, judged)]),
        )

    def verify(self) -> tuple[list[Verdict], Ints]:
        """Every sample's verdict, and which of a prompt's samples give the same answer, ``[P, n]``. Collective."""
        found: dict[int, tuple[list[Verdict], list[Clustered]]] = {}
        for share in gather_objects(on_all_ranks(self._replies)):
            found |= share
        in_order = [found[position] for position in range(len(self._prompts.records))]
        rows = [
            # the reader of the prompts may not know the kind of answer (verl); the verdict does
            [c.cluster if v.extracted is not None else None for c, v in zip(clusters, verdicts, strict=True)]
            for verdicts, clusters in in_order
        ]
        return [verdict for verdicts, _ in in_order for verdict in verdicts], number_answers(rows)

    def _replies(self) -> dict[int, tuple[list[Verdict], list[Clustered]]]:
        return {p: (verdicts.result(), clusters.result()[0]) for p, (verdicts, clusters) in self._asked.items()}


class Evaluator:
    """Evaluates the current policy and critic; the answers stay in the verifier's process."""

    def __init__(self, runtime: Runtime, engine: RolloutEngine, verifier: VerifierService | None) -> None:
        self.runtime, self.engine, self.verifier = runtime, engine, verifier
        assert isinstance(runtime.data, PromptData)
        self.sets = runtime.data.eval_sets
        self._expected: dict[str, ExpectedLengths] = {}  # by set, whose ids are its own

    def run(self, step: int, updates: int, version: int, between_sets: Callable[[], None]) -> dict[str, float]:
        """Metrics ``eval/<set>/<name>`` of every set, for the record of ``step``; nothing stays of what is cut short
        by ``between_sets``.
        """
        metrics: dict[str, float] = {}
        outcomes: dict[str, Any] = {}
        with self.runtime.ledger.phase("evaluate"):
            for number, prompts in enumerate(self.sets):
                if number:
                    between_sets()
                result = self.evaluate(prompts, updates, version)
                name, config = prompts.settings.name, self.runtime.config
                figures = training_metrics(result.samples, config.evaluation.pass_k, config.seed)
                metrics |= {f"eval/{name}/{k}": v for k, v in figures.items()}
                self._log(prompts, step, result)
                outcomes[name] = PromptOutcomes.of(result.samples, config.evaluation.pass_k).to_json()
            if self.runtime.evaluation_log is not None:
                self.runtime.evaluation_log.write({"step": step, "sets": outcomes})
        return metrics

    def evaluate(self, prompts: EvalPrompts, updates: int, version: int) -> EvaluatedSet:
        """Sample, verify and value one set; collective. Samples are seeded by the policy updates so far."""
        runtime, settings, seed = self.runtime, prompts.settings, self.runtime.config.seed
        draws = [
            PromptDraw(r.id, ids, False, sample_seed(seed, f"eval:{settings.name}", updates, r.id, 0), r.source)
            for r, ids in zip(prompts.records, prompts.token_ids, strict=True)
        ]
        hearing = _Hearing(prompts, self.verifier, prompt_opening(runtime))
        batch = rollout(
            self.engine,
            draws,
            samples_per_prompt=settings.samples_per_prompt,
            max_response_tokens=runtime.config.data.max_response_tokens,
            version=version,
            decode=decoder(runtime),
            expected=self._expected.setdefault(settings.name, ExpectedLengths()),
            hear=hearing.hear,
        )
        verdicts, answers = hearing.verify()
        terminal, logged = self._values(prompts, batch) if "critic" in runtime.engines else (None, None)
        return EvaluatedSet(batch, verdicts, logged, _samples(prompts, batch, verdicts, answers, terminal))

    def _values(self, prompts: EvalPrompts, batch: Rollouts) -> tuple[Floats, tuple[Ragged, Ragged]]:
        """The value of each response at its end, ``[N]``, and on rank 0 token ids and values of the rows to log."""
        critic, sampled, lengths = self.runtime.engines["critic"], batch.response_token_ids, batch.response_lengths
        dealt = critic.homes(Sequences(batch.prompt_token_ids, sampled, lengths))
        homes = Homes(critic.groups.grid, dealt)
        token_ids = move_rows(sampled, lengths, batch.source, homes.members)
        values = critic.forward(Sequences(batch.prompt_token_ids, token_ids, lengths, dealt))["values"]
        position = self.runtime.config.algorithm.mstep.terminal_value
        terminal = terminal_values(homes.grid, values, dealt, lengths, position)
        if not terminal.isfinite().all():
            bad = int((~terminal.isfinite()).sum())
            raise RunError(f"evaluation: {bad} of {len(terminal)} terminal values of the critic are not finite")
        floats: Floats = terminal.double().numpy()
        rows = torch.tensor(self._logged_rows(prompts), dtype=torch.int64)
        return floats, (
            to_rank0(sampled.rows(rows), lengths[rows], batch.source[rows]),
            to_rank0(values.rows(rows), lengths[rows] + 1, homes.owners[rows]),
        )

    def _logged_rows(self, prompts: EvalPrompts) -> list[int]:
        """The first sample of the first few prompts."""
        count = min(self.runtime.config.telemetry.logged_rollouts, len(prompts.records))
        return [i * prompts.settings.samples_per_prompt for i in range(count)]

    def _log(self, prompts: EvalPrompts, step: int, result: EvaluatedSet) -> None:
        """The first sample of the first few prompts, with its token values, for the report."""
        if self.runtime.rollout_log is None or result.logged is None:
            return
        tokenizer, batch = self.runtime.tokenizer, result.batch
        for row, ids, values in zip(self._logged_rows(prompts), *result.logged, strict=True):
            rollout_ = LoggedRollout(
                step=step,
                eval_set=prompts.settings.name,
                record_id=batch.record_ids[row],
                prompt=tokenizer.decode(batch.prompt_token_ids[row]),
                tokens=[tokenizer.decode([t]) for t in ids.tolist()],
                values=values.tolist(),
                outcome=int(result.verdicts[row].correct),
            )
            self.runtime.rollout_log.write(rollout_.to_json())


def training_metrics(samples: Samples, pass_k: int, seed: int) -> dict[str, float]:
    """A set's figures as flat numbers: all of them at ``pass_k``, the headlines with their intervals (``_low``,
    ``_high``), the headlines of each source (``<source>/...``) where there are several, and the critic's calibration.
    """
    metrics = _means(samples, pass_k, seed)
    sources = sorted(set(samples.sources))
    for source in sources if len(sources) > 1 else []:
        figures = _means(samples.of_source(source), pass_k, seed)
        metrics |= {f"{source}/{k}": v for k, v in figures.items() if k.startswith(HEADLINES)}
    if samples.values is not None:
        values, correct = torch.from_numpy(samples.values).flatten(), torch.from_numpy(samples.correct).flatten()
        metrics |= {f"critic_{k}": v for k, v in calibration(values, correct).figures().items() if k != "accuracy"}
    return metrics


def _means(samples: Samples, pass_k: int, seed: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, figure in PromptBootstrap(samples.prompts, seed=seed).means(prompt_scores(samples, [pass_k])).items():
        metrics[name] = figure.value
        if name.startswith(HEADLINES):
            metrics |= {f"{name}_low": figure.low, f"{name}_high": figure.high}
    return metrics


def _samples(
    prompts: EvalPrompts, batch: Rollouts, verdicts: list[Verdict], answers: Ints, terminal: Floats | None
) -> Samples:
    shape = len(prompts.records), prompts.settings.samples_per_prompt

    def table(column: list[float] | list[bool] | list[int]) -> np.ndarray:
        return np.array(column).reshape(shape)

    lengths = batch.response_lengths
    return Samples(
        record_ids=[record.id for record in prompts.records],
        sources=[record.source for record in prompts.records],
        correct=table([v.correct and v.verified for v in verdicts]),
        answers=answers,
        verified=table([v.verified for v in verdicts]),
        truncated=table(batch.truncated.tolist()),
        response_tokens=table(lengths.tolist()),
        values=None if terminal is None else terminal.reshape(shape),
        details={
            name: table([v.details.get(name, 0.0) for v in verdicts])
            for name in sorted({name for v in verdicts for name in v.details})
        },
    )
