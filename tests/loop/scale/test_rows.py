"""Rows that are made up, and who samples them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tempo_megatron.loop.scale.rows import Rows, draw_rows, queue_shares, sampled
from tempo_megatron.parallel.shards import Grid
from tempo_megatron.rollout.prompts import PromptDraw
from tests.loop.scale.jobs import Case, config_for

CONFIG = config_for(Case(8, "qwen3", ""))


def test_the_longest_draw_is_as_long_as_the_configuration_allows() -> None:
    rows = draw_rows(CONFIG, "longest")
    assert [len(draw.prompt_token_ids) for draw in rows.prompts] == [6] * 8
    assert rows.lengths.tolist() == [10] * 16
    assert [draw.labeled for draw in rows.prompts] == [True] * 4 + [False] * 4


def test_the_long_tail_is_within_the_limits_and_seeded() -> None:
    config = config_for(Case(8, "qwen3", ""), data={"labeled_prompts_per_step": 512, "max_response_tokens": 8000})
    rows = draw_rows(config, "long tail")
    assert torch.equal(rows.lengths, draw_rows(config, "long tail").lengths)
    assert int(rows.lengths.min()) >= 1 and int(rows.lengths.max()) == 8000
    assert float(rows.lengths.float().median()) == pytest.approx(1000, rel=0.15)
    assert all(1 <= len(draw.prompt_token_ids) <= config.data.max_prompt_tokens for draw in rows.prompts)


def test_real_prompts_keep_their_lengths() -> None:
    prompts = [(True, [1, 2]), (False, [3])]
    rows = draw_rows(CONFIG, "longest", prompts)
    assert [(d.labeled, d.prompt_token_ids) for d in rows.prompts] == prompts


def test_a_replica_with_short_responses_draws_more() -> None:
    draws = [PromptDraw(f"{i}", [0], True, i) for i in range(12)]
    lengths = torch.tensor([1000] + [10] * 11)
    shares = queue_shares(Rows(draws, lengths), replicas=2, max_num_seqs=1)
    assert shares.count(shares[0]) == 1 and -1 not in shares


def test_what_fits_at_once_is_dealt_evenly() -> None:
    shares = queue_shares(draw_rows(CONFIG, "longest"), replicas=4, max_num_seqs=64)
    assert Counter(shares) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_a_rank_holds_the_tokens_that_it_has_sampled() -> None:
    rows = draw_rows(CONFIG, "longest")
    shares = queue_shares(rows, 8, 2)
    batches = [sampled(CONFIG, rows, shares, rank) for rank in range(8)]
    held = torch.stack([batch.response_token_ids.lengths for batch in batches])
    assert torch.equal(held.sum(0), rows.lengths)
    assert all(torch.equal(batch.source, batches[0].source) for batch in batches)


@pytest.mark.parametrize(
    ("dimension", "ranks"),
    [("tensor", [12, 13]), ("context", [13, 15]), ("shards", [9, 13]), ("stages", [5, 13, 21])],
)
def test_a_line_of_the_grid(dimension: str, ranks: list[int]) -> None:
    grid = Grid(tensor=2, context=2, shards=2, stages=3)
    assert grid.line(13, dimension) == ranks  # type: ignore[arg-type]
