"""What a step's rollouts are said to be: over all rounds of sampling, and only of checks that came to a verdict."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempo_megatron.config.algorithm import AlgorithmConfig
from tempo_megatron.config.methods import METHODS
from tempo_megatron.config.schema import Config
from tempo_megatron.data.prompts import PromptRecord
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import Rollouts
from tempo_megatron.data.sampler import PromptSampler
from tempo_megatron.loop.collect import Collector
from tempo_megatron.loop.data import Pool, PromptData
from tempo_megatron.loop.verification import RolloutVerifier
from tempo_megatron.parallel import distributed
from tempo_megatron.rollout.collect import Hear
from tempo_megatron.rollout.prompts import PromptDraw
from tempo_megatron.verifiers.verdict import Verdict

SAMPLES = 4
#: What each D_L prompt's samples are: right, wrong, wrong and without an answer, out of time.
OUTCOMES = {"dl-0": "rwnt", "dl-1": "wwww", "dl-2": "rrww", "dl-3": "wwnn", "dl-4": "rwww", "dl-5": "tttr"}


class Verifier:
    """Reads the verdict off the response; keeps count of failures as the service does."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()

    def score_later(self, items: list[tuple[str, str, str]]) -> Future[list[Verdict]]:
        self.failures.update({"timeout": sum(response == "t" for response, _, _ in items)})
        self.failures = +self.failures
        reply: Future[list[Verdict]] = Future()
        reply.set_result([Verdict(r == "r", None if r in "nt" else r, "made", verified=r != "t") for r, _, _ in items])
        return reply


def batch_of(draws: list[PromptDraw], version: int, hear: Hear) -> Rollouts:
    for position, draw in enumerate(draws):
        hear(position, list(OUTCOMES.get(draw.record_id, "wwww")))
    rows = [d for d in draws for _ in range(SAMPLES)]
    n = len(rows)
    return Rollouts(
        record_ids=[d.record_id for d in rows],
        group=torch.arange(len(draws)).repeat_interleave(SAMPLES),
        prompt_token_ids=[[1]] * n,
        response_token_ids=Ragged.of_rows([[2]] * n, torch.int32),
        responses=Ragged.of_texts([c for d in draws for c in OUTCOMES.get(d.record_id, "wwww")]),
        response_bytes=torch.ones(n, dtype=torch.int64),
        finish_reason=["length" if c == "n" else "stop" for d in draws for c in OUTCOMES.get(d.record_id, "wwww")],
        rollout_log_probs=Ragged.of_rows([[0.0]] * n, torch.float32),
        response_lengths=torch.ones(n, dtype=torch.int64),
        source=torch.zeros(n, dtype=torch.int64),
        labeled=torch.tensor([d.labeled for d in rows]),
        weights_version=version,
    )


class InOrder(PromptSampler):
    def _start_epoch(self, epoch: int, drawn: int) -> None:
        self._epoch, self._drawn, self._order = epoch, drawn, list(range(self._size))


def pool(name: str, size: int, *, labeled: bool) -> Pool:
    records = [
        PromptRecord(f"{name}-{i}", name, [{"role": "user", "content": "?"}], "7" if labeled else None, "int", labeled)
        for i in range(size)
    ]
    return Pool(records, [[1]] * size, InOrder(size, 0))


@pytest.fixture
def told() -> list[str]:
    """Lines for the user."""
    return []


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> Collector:
    labeled, unlabeled = pool("dl", 6, labeled=True), pool("du", 8, labeled=False)
    config = Config.model_validate({
        "stage": "tempo", "steps": 1, "output_dir": "-", "actor": {"init": "-"}, "critic": {"init": "-"},
        "data": {"labeled_prompts_per_step": 2, "unlabeled_prompts_per_step": 3},
        "rollout": {"samples_per_prompt": SAMPLES},
    })  # fmt: skip
    data = PromptData(labeled, unlabeled, {r.id: ("7", "int") for r in labeled.records}, [])
    runtime: Any = SimpleNamespace(config=config, data=data, ledger=SimpleNamespace(phase=lambda name: nullcontext()))
    distributed.start(threads=1, timeout_s=60)
    service: Any = Verifier()
    made = Collector(runtime, None, RolloutVerifier(service, METHODS["tempo"], data, told.append, lambda ids: ""))  # type: ignore[arg-type]
    monkeypatch.setattr(made, "_generate", batch_of)
    return made


def test_failed_checks_are_neither_right_nor_unreadable(collector: Collector, told: list[str]) -> None:
    assert collector.verifier.service is not None
    collector.verifier.service.failures["timeout"] += 37  # an evaluation's
    found = collector.collect(1, 0, 0, unlabeled=True).metrics()
    assert told == ["verifier: checks failed: 1 timeout; these responses count as unverified"]
    assert (found["verify/unverified"], found["verify/timeout"]) == (1, 1)
    assert found["reward/labeled_mean"] == pytest.approx(1 / 7)
    assert found["reward/labeled_readable"] == pytest.approx(6 / 7)
    assert found["response/labeled_truncated"] == pytest.approx(1 / 8)
    assert collector.collect(2, 0, 0, unlabeled=False).metrics()["reward/labeled_mean"] == pytest.approx(2 / 8)


def test_figures_are_of_all_rounds_and_of_what_the_filter_drops(collector: Collector) -> None:
    collector.runtime.config = collector.runtime.config.model_copy(
        update={
            "algorithm": AlgorithmConfig.model_validate({
                "filter": {"enabled": True, "apply_to_critic": True, "max_rounds": 9}
            }),
            "data": collector.runtime.config.data.model_copy(update={"labeled_prompts_per_step": 3}),
        }
    )  # fmt: skip
    collected = collector.collect(1, 0, 0, unlabeled=False)
    assert set(collected.batch.record_ids) == {"dl-0", "dl-2", "dl-4"}
    found = collected.metrics()
    assert found["data/generation_rounds"] == 3
    everything = "".join(OUTCOMES[f"dl-{i}"] for i in range(6))  # the last round drew two
    checked = everything.replace("t", "")
    assert found["reward/labeled_mean"] == pytest.approx(everything.count("r") / len(checked))
    assert found["reward/labeled_readable"] == pytest.approx(1 - checked.count("n") / len(checked))


def test_prompts_that_trained_nothing_come_again_with_the_same_seeds(collector: Collector) -> None:
    def unlabeled() -> list[str]:
        batch = collector.collect(1, 5, 0, unlabeled=True).batch
        return [i for i in dict.fromkeys(batch.record_ids) if i.startswith("du")]

    first = unlabeled()
    collector.put_back_unlabeled()
    collector.put_back_unlabeled()  # only once
    assert unlabeled() == first == ["du-0", "du-1", "du-2"]
    assert unlabeled() == ["du-3", "du-4", "du-5"]
    collector.collect(2, 5, 0, unlabeled=False)
    collector.put_back_unlabeled()  # none were drawn
    assert unlabeled() == ["du-6", "du-7", "du-0"]
