"""What is asked of the verifier's processes for each kind of method, and what becomes of the replies: real workers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.config.methods import METHODS
from tempo_megatron.config.schema import VerifierConfig
from tempo_megatron.data.prompts import PromptRecord
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.rollout import Rollouts
from tempo_megatron.data.sampler import PromptSampler
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.loop.data import ORACLE_SOURCE, Pool, PromptData
from tempo_megatron.loop.runtime import _share
from tempo_megatron.loop.verification import CheckCounts, RolloutVerifier, Verified
from tempo_megatron.parallel import distributed
from tempo_megatron.rollout.prompts import PromptDraw
from tempo_megatron.verifiers.service import VerifierService

#: (record, response, cut off)
SAMPLED = [
    ("l0", r"\boxed{7}", False), ("l0", r"\boxed{8}", False), ("l0", "I do not know", True),
    ("u0", r"\boxed{3}", False), ("u0", r"\boxed{03}", False), ("u0", r"\boxed{4}", False), ("u0", "hm", True),
    ("u1", r"\boxed{3}", False), ("u1", r"\boxed{4}", False),
]  # fmt: skip
ANSWERS = {"l0": "7", "u0": "4", "u1": "3"}


def sampled(rows: list[tuple[str, str, bool]] = SAMPLED) -> Rollouts:
    ids = [record for record, _, _ in rows]
    n = len(rows)
    return Rollouts(
        record_ids=ids,
        group=torch.tensor([sorted(set(ids)).index(i) for i in ids], dtype=torch.int64),
        prompt_token_ids=[[1]] * n,
        response_token_ids=Ragged.of_rows([[2]] * n, torch.int32),
        responses=Ragged.of_texts([text for _, text, _ in rows]),
        response_bytes=torch.tensor([len(text) for _, text, _ in rows]),
        finish_reason=["length" if cut else "stop" for _, _, cut in rows],
        rollout_log_probs=Ragged.of_rows([[0.0]] * n, torch.float32),
        response_lengths=torch.ones(n, dtype=torch.int64),
        source=torch.zeros(n, dtype=torch.int64),
        labeled=torch.tensor([i.startswith("l") for i in ids], dtype=torch.bool),
        weights_version=0,
    )


def verified(verifier: RolloutVerifier, rollouts: Rollouts) -> Verified:
    """As a step does it, with what is finished last heard of first."""
    groups = [(rollouts.group == g).nonzero().flatten().tolist() for g in rollouts.group.unique().tolist()]
    firsts = [rows[0] for rows in groups]
    hearing = verifier.begin(
        [PromptDraw(rollouts.record_ids[i], rollouts.prompt_token_ids[i], bool(rollouts.labeled[i]), 0) for i in firsts]
    )
    texts = rollouts.responses.texts()
    for position in reversed(range(len(groups))):
        hearing.hear(position, [texts[row] for row in groups[position]])
    return verifier.verify(hearing, rollouts)


def pool(*ids: str) -> Pool:
    records = [PromptRecord(i, "made", [], ANSWERS[i] if i[0] == "l" else None, "int", i[0] == "l") for i in ids]
    return Pool(records, [[1]] * len(ids), PromptSampler(len(ids), 0))


def no_tag(prompt: object) -> str:
    return ""


DATA = PromptData(pool("l0"), pool("u0", "u1"), {"l0": ("7", "int")}, [])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerifierService]:
    distributed.start(threads=1, timeout_s=60)
    file: Path = tmp_path_factory.mktemp("verification") / "answers.parquet"
    columns = {"id": ["u0", "u1"], "source": ["made"] * 2, "prompt": ["?"] * 2, "answer": ["4", "3"]}
    pq.write_table(pa.table({**columns, "answer_type": ["int"] * 2}), file)
    with VerifierService({ORACLE_SOURCE: [str(file)]}, VerifierConfig(workers=1)) as service:
        yield service


def test_labelled_rows_get_outcomes_and_the_others_none(service: VerifierService) -> None:
    found = verified(RolloutVerifier(service, METHODS["tempo"], DATA, print, no_tag), sampled())
    assert found.batch.outcome[:3].tolist() == [1, 0, 0] and found.batch.outcome[3:].isnan().all()
    assert found.batch.oracle_outcome.isnan().all() and found.batch.answer_cluster.tolist() == [-1] * 9
    assert found.counts == CheckCounts(labeled=3, truncated=1, checked=3, right=1, readable=2)
    assert found.counts.metrics() == {
        "verify/unverified": 0,
        "reward/labeled_mean": pytest.approx(1 / 3),
        "reward/labeled_readable": pytest.approx(2 / 3),
        "response/labeled_truncated": pytest.approx(1 / 3),
    }


def test_the_oracle_hears_the_truth(service: VerifierService) -> None:
    batch = verified(RolloutVerifier(service, METHODS["oracle"], DATA, print, no_tag), sampled()).batch
    assert batch.oracle_outcome[3:].tolist() == [0, 0, 1, 0, 1, 0]
    assert batch.oracle_outcome[:3].isnan().all() and batch.answer_cluster.tolist() == [-1] * 9


def test_a_vote_hears_which_answers_are_equal(service: VerifierService) -> None:
    batch = verified(RolloutVerifier(service, METHODS["ttrl"], DATA, print, no_tag), sampled()).batch
    assert batch.answer_cluster.tolist() == [-1, -1, -1, 0, 0, 1, -1, 0, 1]
    assert batch.oracle_outcome.isnan().all()


def test_a_prompt_that_opens_reasoning_leaves_the_response_in_it(service: VerifierService) -> None:
    rows = [("l0", r"\boxed{7}? Wait", True), ("l0", r"\boxed{8}? No. </think> \boxed{7}", False), ("l0", "7", False)]
    answers = [*rows, ("u0", r"\boxed{3}", True), ("u0", r"a guess </think> \boxed{3}", False)]
    verifier = RolloutVerifier(service, METHODS["ttrl"], DATA, print, lambda ids: "<think>")
    batch = verified(verifier, sampled(answers)).batch
    assert batch.outcome[:3].tolist() == [0, 1, 0]
    assert batch.answer_cluster.tolist() == [-1, -1, -1, -1, 0]
    assert batch.responses.texts() == [text for _, text, _ in answers]


def test_an_answer_that_cannot_be_asked_about_is_told(service: VerifierService) -> None:
    data = PromptData(pool("l0"), pool("u0", "u1"), {"l0": ("seven", "int")}, [])
    verifier = RolloutVerifier(service, METHODS["tempo"], data, print, no_tag)
    with pytest.raises(TempoError, match="answer 'seven' of kind 'int'"):
        verified(verifier, sampled())


@pytest.mark.parametrize(
    ("workers", "leaders", "shares"),
    [(2, 1, [2]), (2, 2, [1, 1]), (2, 8, [1] * 8), (8, 3, [3, 3, 2]), (5, 4, [2, 1, 1, 1])],
)
def test_a_nodes_workers_are_shared_by_its_replicas(workers: int, leaders: int, shares: list[int]) -> None:
    assert [_share(workers, index, leaders) for index in range(leaders)] == shares


def test_nothing_sampled_is_nothing_found(service: VerifierService) -> None:
    for stage in ("tempo", "oracle", "ttrl"):
        found = verified(RolloutVerifier(service, METHODS[stage], DATA, print, no_tag), sampled([]))
        assert len(found.batch) == 0 and found.counts == CheckCounts()
        assert found.counts.metrics() == {"verify/unverified": 0}


def test_failures_are_told_and_train_nothing(service: VerifierService, tmp_path: Path) -> None:
    """A time limit that nothing keeps to."""
    told: list[str] = []
    file = tmp_path / "answers.parquet"
    columns = {"id": ["u0"], "source": ["made"], "prompt": ["?"], "answer": ["4"], "answer_type": ["int"]}
    pq.write_table(pa.table(columns), file)
    with VerifierService({ORACLE_SOURCE: [str(file)]}, VerifierConfig(workers=1, timeout_s=1e-6)) as hasty:
        verifier = RolloutVerifier(hasty, METHODS["oracle"], DATA, told.append, no_tag)
        found = verified(verifier, sampled([row for row in SAMPLED if row[0] == "u0"]))
        assert len(found.batch) == 0 and found.counts.unverified == 4
        (cause,) = found.counts.failures
        assert found.counts.metrics() == {"verify/unverified": 4, f"verify/{cause}": 4}
        assert told == [f"verifier: checks failed: 4 {cause}; these responses count as unverified"]
        with pytest.raises(RunError, match="none of 3 labelled responses could be verified: "):
            verified(verifier, sampled(SAMPLED[:3]))


failures = st.dictionaries(st.sampled_from("ab"), st.integers(1, 9)).map(Counter)
counts = st.builds(CheckCounts, *[st.integers(0, 9)] * 6, failures)


@given(counts, counts)
def test_rounds_add_up(one: CheckCounts, two: CheckCounts) -> None:
    both = one + two
    assert (both.labeled, both.checked, both.unverified) == (
        one.labeled + two.labeled,
        one.checked + two.checked,
        one.unverified + two.unverified,
    )
    assert both.failures["a"] == one.failures["a"] + two.failures["a"]
    if both.checked:
        assert both.accuracy == pytest.approx((one.right + two.right) / (one.checked + two.checked))
    assert math.isnan(CheckCounts().truncated_fraction)
