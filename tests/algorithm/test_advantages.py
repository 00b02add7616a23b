from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo_megatron.algorithm.advantages import (
    Normalization,
    TerminalPosition,
    em_token_advantages,
    response_lengths,
    terminal_rewards,
    value_targets,
)

NORMALIZATIONS: tuple[Normalization, ...] = ("whiten", "scale", "none")


def random_batch(seed: int, rows: int = 6, longest: int = 5) -> dict[str, Tensor]:
    """Random responses (one of length 1, one of length L), garbage where no state is, NaN outcomes if unlabeled."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=g)
    lengths[0], lengths[-1] = 1, longest
    labeled = torch.rand(rows, generator=g) < 0.5
    outcome = torch.randint(0, 2, (rows,), generator=g).float()
    values = torch.randn(rows, longest + 1, generator=g)
    values[torch.arange(longest + 1) > lengths[:, None]] = math.nan
    return {
        "mask": torch.arange(longest) < lengths[:, None],
        "labeled": labeled,
        "outcome": torch.where(labeled, outcome, math.nan),
        "values": values,
    }


def advantages_of(
    batch: dict[str, Tensor], rows: Tensor, normalization: Normalization, position: TerminalPosition = "post_last"
) -> Tensor:
    terminal = terminal_rewards(
        batch["outcome"], batch["labeled"], batch["values"], batch["mask"], position=position, clamp=True
    )
    return em_token_advantages(terminal, batch["values"], batch["mask"], rows=rows, normalization=normalization)


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> list[float]:
    """Textbook generalized advantage estimation of one trajectory, backwards in time, 0 after the end."""
    advantages: list[float] = []
    running = 0.0
    for t in reversed(range(len(rewards))):
        following = float(values[t + 1]) if t + 1 < len(rewards) else 0.0
        running = float(rewards[t]) + gamma * following - float(values[t]) + gamma * lam * running
        advantages.insert(0, running)
    return advantages


def test_golden_terminal_rewards_ignore_true_labels_of_unlabeled_rows(golden):
    unit_terminal = terminal_rewards(
        golden.unit(golden.rewards),
        golden.labeled,
        golden.unit(golden.values),
        golden.mask,
        position="pre_last",
        clamp=False,
    )
    torch.testing.assert_close(unit_terminal, golden.unit(golden.terminal))


@pytest.mark.parametrize("scale", ["released", "unit"])
def test_golden_advantages(golden, scale):
    terminal, values = golden.terminal, golden.values
    if scale == "unit":
        terminal, values = golden.unit(terminal), golden.unit(values)
    everyone = torch.ones(4, dtype=torch.bool)
    whitened = em_token_advantages(terminal, values, golden.mask, rows=everyone, normalization="whiten")
    torch.testing.assert_close(whitened, golden.advantages, atol=2e-5, rtol=0)
    raw = em_token_advantages(terminal, values, golden.mask, rows=everyone, normalization="none")
    factor = 2.0 if scale == "unit" else 1.0
    tokens = factor * raw[golden.mask]
    torch.testing.assert_close(
        tokens, torch.tensor([0.9, 0.7, 0.4, -0.8, -0.6, 0.5, 0.3, 0.1, 0.0, -0.8, -0.2, 0.0]), atol=1e-6, rtol=0
    )
    assert float(tokens.mean()) == pytest.approx(0.0416667, abs=1e-6)
    assert float(tokens.var()) == pytest.approx(0.3153788, abs=1e-6)


def test_golden_value_targets(golden):
    targets, target_mask = value_targets(golden.unit(golden.rewards), golden.labeled, golden.mask, position="pre_last")
    assert target_mask.tolist() == [
        [True, True, True, False, False],
        [True, True, False, False, False],
        *[[False] * 5] * 2,
    ]
    assert targets.tolist() == [[1, 1, 1, 0, 0], [0] * 5, [0] * 5, [0] * 5]


def test_post_last_also_trains_the_state_it_reads(golden):
    outcome = torch.tensor([1.0, 1.0, math.nan, math.nan])
    targets, target_mask = value_targets(outcome, golden.labeled, golden.mask, position="post_last")
    assert target_mask.sum(1).tolist() == [4, 3, 0, 0]
    assert torch.equal(targets, target_mask.float())


@pytest.mark.parametrize("position", ["pre_last", "post_last"])
def test_terminal_column_of_shortest_and_longest_response(position):
    values = torch.tensor([[0.1, 0.2, math.nan, math.nan], [0.3, 0.4, 0.5, 0.6]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    unlabeled = torch.tensor([False, False])
    got = terminal_rewards(torch.full((2,), math.nan), unlabeled, values, mask, position=position, clamp=False)
    torch.testing.assert_close(got, torch.tensor([0.1, 0.5] if position == "pre_last" else [0.2, 0.6]))


def test_clamp_bounds_values_but_not_outcomes():
    values = torch.tensor([[0.0, 1.7], [0.0, -0.4], [0.0, 0.3], [0.0, 9.0]])
    mask = torch.ones(4, 1, dtype=torch.bool)
    outcome, labeled = torch.tensor([math.nan, math.nan, math.nan, 0.0]), torch.tensor([False, False, False, True])
    clamped = terminal_rewards(outcome, labeled, values, mask, position="post_last", clamp=True)
    torch.testing.assert_close(clamped, torch.tensor([1.0, 0.0, 0.3, 0.0]))
    free = terminal_rewards(outcome, labeled, values, mask, position="post_last", clamp=False)
    torch.testing.assert_close(free, torch.tensor([1.7, -0.4, 0.3, 0.0]))


def test_last_raw_advantage_of_an_unlabeled_row_is_zero_before_the_last_token():
    batch = random_batch(3)
    raw = advantages_of(
        {**batch, "labeled": torch.zeros(6, dtype=torch.bool)}, torch.ones(6).bool(), "none", "pre_last"
    )
    free = terminal_rewards(
        batch["outcome"], torch.zeros(6).bool(), batch["values"], batch["mask"], position="pre_last", clamp=False
    )
    inside = (free >= 0) & (free <= 1)
    last = raw.gather(1, response_lengths(batch["mask"])[:, None] - 1).squeeze(1)
    assert inside.any() and (last[inside] == 0).all()


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_all_labeled_equals_gae_with_gamma_lambda_one(seed):
    batch = random_batch(seed)
    outcome = torch.randint(0, 2, (6,), generator=torch.Generator().manual_seed(seed)).float()
    batch = {**batch, "labeled": torch.ones(6).bool(), "outcome": outcome}
    ours = advantages_of(batch, torch.ones(6).bool(), "none")
    for row, length in enumerate(response_lengths(batch["mask"]).tolist()):
        rewards = torch.zeros(length)
        rewards[-1] = outcome[row]
        expected = torch.tensor(gae(rewards, batch["values"][row, :length], 1.0, 1.0))
        torch.testing.assert_close(ours[row, :length], expected, atol=1e-5, rtol=1e-5)
        assert (ours[row, length:] == 0).all()


@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
@settings(max_examples=40, deadline=None)
def test_whitened_advantages_are_affine_invariant(seed, scale, shift):
    batch = random_batch(seed)
    terminal = torch.randn(6, generator=torch.Generator().manual_seed(seed))
    everyone = torch.ones(6).bool()
    plain = em_token_advantages(terminal, batch["values"], batch["mask"], rows=everyone, normalization="whiten")
    mapped = em_token_advantages(
        scale * terminal + shift,
        scale * batch["values"] + shift,
        batch["mask"],
        rows=everyone,
        normalization="whiten",
    )
    torch.testing.assert_close(mapped, plain, atol=2e-4, rtol=1e-3)


@given(seed=st.integers(0, 2**31 - 1), extra=st.integers(1, 4), normalization=st.sampled_from(NORMALIZATIONS))
@settings(max_examples=40, deadline=None)
def test_padding_and_row_order_do_not_matter(seed, extra, normalization):
    batch = random_batch(seed)
    rows = torch.tensor([True, False, True, True, False, True])
    expected = advantages_of(batch, rows, normalization)
    padded = {
        **batch,
        "mask": torch.nn.functional.pad(batch["mask"], (0, extra)),
        "values": torch.nn.functional.pad(batch["values"], (0, extra), value=math.nan),
    }
    wider = advantages_of(padded, rows, normalization)
    assert torch.equal(wider[:, :5], expected) and (wider[:, 5:] == 0).all()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    shuffled = advantages_of({k: v[order] for k, v in batch.items()}, rows[order], normalization)
    torch.testing.assert_close(shuffled, expected[order], atol=1e-6, rtol=1e-6)


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_outcomes_of_unlabeled_rows_change_no_bit(seed):
    batch = random_batch(seed)
    noise = torch.randn(6, generator=torch.Generator().manual_seed(seed + 1))
    corrupt = {**batch, "outcome": torch.where(batch["labeled"], batch["outcome"], noise)}
    everyone = torch.ones(6).bool()
    assert torch.equal(advantages_of(batch, everyone, "whiten"), advantages_of(corrupt, everyone, "whiten"))
    for one, other in zip(
        value_targets(batch["outcome"], batch["labeled"], batch["mask"], position="post_last"),
        value_targets(corrupt["outcome"], batch["labeled"], batch["mask"], position="post_last"),
        strict=True,
    ):
        assert torch.equal(one, other) and one.isfinite().all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_statistics_use_only_the_rows_the_actor_trains_on(normalization):
    batch = random_batch(11)
    rows = torch.tensor([True, True, False, False, True, True])
    got = advantages_of(batch, rows, normalization)
    alone = advantages_of({k: v[rows] for k, v in batch.items()}, torch.ones(4).bool(), normalization)
    assert torch.equal(got[rows], alone)
    assert (got[~rows] == 0).all()


def test_normalizations_have_the_moments_they_promise():
    batch, everyone = random_batch(5, rows=12, longest=9), torch.ones(12).bool()
    raw, whitened, scaled = (advantages_of(batch, everyone, n)[batch["mask"]] for n in ("none", "whiten", "scale"))
    assert float(whitened.mean()) == pytest.approx(0, abs=1e-6)
    assert float(whitened.var()) == pytest.approx(1, abs=1e-5)
    assert float(scaled.square().mean()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(scaled.sign(), raw.sign())


@pytest.mark.parametrize(("normalization", "expected"), [("whiten", 0.0), ("scale", 1.0), ("none", 0.7)])
def test_one_valid_token_is_finite(normalization, expected):
    got = em_token_advantages(
        torch.tensor([1.0]),
        torch.tensor([[0.3, 0.9]]),
        torch.ones(1, 1).bool(),
        rows=torch.ones(1).bool(),
        normalization=normalization,
    )
    assert float(got) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_no_row_to_train_on_gives_zeros(normalization):
    assert (advantages_of(random_batch(1), torch.zeros(6).bool(), normalization) == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.tensor([[True, True], [False, False]])}, "row 1 has no response token"),
        ({"mask": torch.tensor([[True, True], [False, True]])}, "first T_i columns"),
        ({"outcome": torch.tensor([math.nan, math.nan])}, "labeled row 0 has outcome nan"),
        ({"outcome": torch.tensor([-1.0, math.nan])}, "labeled row 0 has outcome -1.0"),
        ({"values": torch.zeros(2, 2)}, "one column more"),
    ],
)
def test_refuses_what_would_be_silently_wrong(change, message):
    arguments = {
        "outcome": torch.tensor([1.0, math.nan]),
        "labeled": torch.tensor([True, False]),
        "values": torch.zeros(2, 3),
        "mask": torch.ones(2, 2).bool(),
    }
    with pytest.raises(ValueError, match=message):
        terminal_rewards(**{**arguments, **change}, position="post_last", clamp=True)


def test_a_row_without_tokens_has_no_target():
    mask = torch.tensor([[True], [False]])
    _, target_mask = value_targets(torch.ones(2), torch.ones(2).bool(), mask, position="post_last")
    assert target_mask.tolist() == [[True, True], [False, False]]
