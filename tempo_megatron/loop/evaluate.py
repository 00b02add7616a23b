"""Sample the evaluation sets, let the verifier process score them, and judge policy and critic."""

from __future__ import annotations

import torch
from torch import Tensor

from tempo_megatron.algorithm.diagnostics import calibration
from tempo_megatron.data.rollout import RolloutBatch
from tempo_megatron.evaluation.metrics import summarize
from tempo_megatron.loop.collect import decoder
from tempo_megatron.loop.data import EvalPrompts, PromptData
from tempo_megatron.loop.session import Session
from tempo_megatron.parallel.distributed import on_rank0
from tempo_megatron.rollout.collect import PromptDraw, rollout
from tempo_megatron.rollout.engine import RolloutEngine
from tempo_megatron.rollout.sampling import sample_seed
from tempo_megatron.telemetry.run_folder import LoggedRollout
from tempo_megatron.training.microbatch import Sequences
from tempo_megatron.verifiers.service import VerifierService
from tempo_megatron.verifiers.verdict import Verdict


class Evaluator:
    """Evaluates the current policy and critic; the answers stay in the verifier's process."""

    def __init__(self, session: Session, engine: RolloutEngine, verifier: VerifierService | None) -> None:
        self.session, self.engine, self.verifier = session, engine, verifier
        assert isinstance(session.data, PromptData)
        self.sets = session.data.eval_sets

    def run(self, step: int, updates: int, version: int) -> dict[str, float]:
        """Metrics ``eval/<set>/<name>`` of every set; samples are seeded by the policy updates so far."""
        metrics: dict[str, float] = {}
        with self.session.ledger.phase("evaluate"):
            for prompts in self.sets:
                metrics.update(self._run_set(prompts, step, updates, version))
        return metrics

    def _run_set(self, prompts: EvalPrompts, step: int, updates: int, version: int) -> dict[str, float]:
        session, settings = self.session, prompts.settings
        draws = [
            PromptDraw(r.id, ids, False, sample_seed(session.config.seed, f"eval:{settings.name}", updates, r.id, 0))
            for r, ids in zip(prompts.records, prompts.token_ids, strict=True)
        ]
        batch = rollout(
            self.engine,
            draws,
            samples_per_prompt=settings.samples_per_prompt,
            max_response_tokens=session.config.data.max_response_tokens,
            version=version,
            decode=decoder(session),
        )
        verdicts = on_rank0(lambda: self._score(settings.name, batch))
        metrics = _policy_metrics(batch, verdicts, settings.samples_per_prompt, session.config.evaluation.pass_k)
        values: Tensor | None = None
        if "critic" in session.engines:
            critic = session.engines["critic"]
            values = critic.forward(Sequences(batch.prompt_token_ids, batch.response_token_ids))["values"]
            correct = torch.tensor([v.correct for v in verdicts], dtype=torch.float32)
            terminal = values.gather(1, batch.response_lengths[:, None]).squeeze(1)
            metrics |= {f"critic_{k}": v for k, v in calibration(terminal, correct).items() if k != "accuracy"}
        self._log(prompts, step, batch, values, verdicts)
        return {f"eval/{settings.name}/{k}": v for k, v in metrics.items()}

    def _score(self, name: str, batch: RolloutBatch) -> list[Verdict]:
        assert self.verifier is not None
        return self.verifier.score_records(name, list(zip(batch.record_ids, batch.responses, strict=True)))

    def _log(
        self, prompts: EvalPrompts, step: int, batch: RolloutBatch, values: Tensor | None, verdicts: list[Verdict]
    ) -> None:
        """The first sample of the first few prompts, with its token values, for the report."""
        if self.session.rollout_log is None:
            return
        tokenizer, n = self.session.tokenizer, prompts.settings.samples_per_prompt
        for i in range(min(self.session.config.telemetry.logged_rollouts, len(prompts.records))):
            row = i * n
            ids = batch.response_token_ids[row]
            rollout_ = LoggedRollout(
                step=step,
                eval_set=prompts.settings.name,
                record_id=batch.record_ids[row],
                prompt=tokenizer.decode(batch.prompt_token_ids[row]),
                tokens=[tokenizer.decode([t]) for t in ids],
                values=[] if values is None else values[row, : len(ids) + 1].tolist(),
                outcome=int(verdicts[row].correct),
            )
            self.session.rollout_log.write(rollout_.to_json())


def _policy_metrics(batch: RolloutBatch, verdicts: list[Verdict], n: int, pass_k: int) -> dict[str, float]:
    correct = torch.tensor([v.correct for v in verdicts]).view(-1, n)
    extracted = [[v.extracted for v in verdicts[i : i + n]] for i in range(0, len(verdicts), n)]
    metrics = summarize(correct, extracted, pass_k)
    metrics["truncated"] = sum(r == "length" for r in batch.finish_reason) / len(batch)
    metrics["response_tokens"] = float(batch.response_lengths.float().mean())
    for name in sorted({k for v in verdicts for k in v.details}):
        metrics[name] = sum(v.details.get(name, 0.0) for v in verdicts) / len(verdicts)
    return metrics
