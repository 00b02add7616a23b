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
    target_states,
    terminal_rewards,
    terminal_states,
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


def terminal_of(batch: dict[str, Tensor], position: TerminalPosition = "post_last", *, clamp: bool) -> Tensor:
    """Terminal rewards, of values in a table ``[N, L + 1]``."""
    states = terminal_states(batch["mask"].sum(1), position)
    at_the_end = batch["values"].gather(1, states[:, None]).squeeze(1)
    return terminal_rewards(batch["outcome"], batch["labeled"], at_the_end, clamp=clamp)


def of_tokens(terminal: Tensor, values: Tensor, mask: Tensor, normalization: Normalization) -> Tensor:
    """Advantages in a table ``[N, L]``, of the flat tokens that the functions take."""
    table = torch.zeros_like(values[:, :-1])
    table[mask] = em_token_advantages(
        terminal.repeat_interleave(mask.sum(1)), values[:, :-1][mask], normalization=normalization
    )
    return table


def advantages_of(
    batch: dict[str, Tensor], rows: Tensor, normalization: Normalization, position: TerminalPosition = "post_last"
) -> Tensor:
    terminal = terminal_of(batch, position, clamp=True)
    return of_tokens(terminal, batch["values"], batch["mask"] & rows[:, None], normalization)


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
    batch = {
        "outcome": golden.unit(golden.rewards),
        "labeled": golden.labeled,
        "values": golden.unit(golden.values),
        "mask": golden.mask,
    }
    unit_terminal = terminal_of(batch, "pre_last", clamp=False)
    torch.testing.assert_close(unit_terminal, golden.unit(golden.terminal))


@pytest.mark.parametrize("scale", ["released", "unit"])
def test_golden_advantages(golden, scale):
    terminal, values = golden.terminal, golden.values
    if scale == "unit":
        terminal, values = golden.unit(terminal), golden.unit(values)
    whitened = of_tokens(terminal, values, golden.mask, "whiten")
    torch.testing.assert_close(whitened, golden.advantages, atol=2e-5, rtol=0)
    raw = of_tokens(terminal, values, golden.mask, "none")
    factor = 2.0 if scale == "unit" else 1.0
    tokens = factor * raw[golden.mask]
    torch.testing.assert_close(
        tokens, torch.tensor([0.9, 0.7, 0.4, -0.8, -0.6, 0.5, 0.3, 0.1, 0.0, -0.8, -0.2, 0.0]), atol=1e-6, rtol=0
    )
    assert float(tokens.mean()) == pytest.approx(0.0416667, abs=1e-6)
    assert float(tokens.var()) == pytest.approx(0.3153788, abs=1e-6)


def test_golden_value_targets(golden):
    """The outcome at so many states."""
    outcome, lengths = golden.unit(golden.rewards), golden.mask.sum(1)
    assert target_states(outcome, golden.labeled, lengths, position="pre_last").tolist() == [3, 2, 0, 0]


def test_post_last_also_trains_the_state_it_reads(golden):
    outcome = torch.tensor([1.0, 1.0, math.nan, math.nan])
    states = target_states(outcome, golden.labeled, golden.mask.sum(1), position="post_last")
    assert states.tolist() == [4, 3, 0, 0]


@pytest.mark.parametrize("position", ["pre_last", "post_last"])
def test_terminal_column_of_shortest_and_longest_response(position):
    batch = {
        "values": torch.tensor([[0.1, 0.2, math.nan, math.nan], [0.3, 0.4, 0.5, 0.6]]),
        "mask": torch.tensor([[True, False, False], [True, True, True]]),
        "labeled": torch.tensor([False, False]),
        "outcome": torch.full((2,), math.nan),
    }
    got = terminal_of(batch, position, clamp=False)
    torch.testing.assert_close(got, torch.tensor([0.1, 0.5] if position == "pre_last" else [0.2, 0.6]))


def test_clamp_bounds_values_but_not_outcomes():
    values = torch.tensor([1.7, -0.4, 0.3, 9.0])
    outcome, labeled = torch.tensor([math.nan, math.nan, math.nan, 0.0]), torch.tensor([False, False, False, True])
    clamped = terminal_rewards(outcome, labeled, values, clamp=True)
    torch.testing.assert_close(clamped, torch.tensor([1.0, 0.0, 0.3, 0.0]))
    free = terminal_rewards(outcome, labeled, values, clamp=False)
    torch.testing.assert_close(free, torch.tensor([1.7, -0.4, 0.3, 0.0]))


def test_last_raw_advantage_of_an_unlabeled_row_is_zero_before_the_last_token():
    batch = random_batch(3)
    batch["labeled"] = torch.zeros(6, dtype=torch.bool)
    raw = advantages_of(batch, torch.ones(6).bool(), "none", "pre_last")
    free = terminal_of(batch, "pre_last", clamp=False)
    inside = (free >= 0) & (free <= 1)
    last = raw.gather(1, batch["mask"].sum(1)[:, None] - 1).squeeze(1)
    assert inside.any() and (last[inside] == 0).all()


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_all_labeled_equals_gae_with_gamma_lambda_one(seed):
    batch = random_batch(seed)
    outcome = torch.randint(0, 2, (6,), generator=torch.Generator().manual_seed(seed)).float()
    batch = {**batch, "labeled": torch.ones(6).bool(), "outcome": outcome}
    ours = advantages_of(batch, torch.ones(6).bool(), "none")
    for row, length in enumerate(batch["mask"].sum(1).tolist()):
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
    plain = of_tokens(terminal, batch["values"], batch["mask"], "whiten")
    mapped = of_tokens(scale * terminal + shift, scale * batch["values"] + shift, batch["mask"], "whiten")
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
    lengths = batch["mask"].sum(1)
    states = target_states(batch["outcome"], batch["labeled"], lengths, position="post_last")
    assert torch.equal(states, target_states(corrupt["outcome"], batch["labeled"], lengths, position="post_last"))


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
    got = em_token_advantages(torch.tensor([1.0]), torch.tensor([0.3]), normalization=normalization)
    assert float(got) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_no_row_to_train_on_gives_zeros(normalization):
    assert (advantages_of(random_batch(1), torch.zeros(6).bool(), normalization) == 0).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_tokens_spread_over_shards_are_normalized_together(normalization):
    """Each shard with its own rows, one of them with none; a shard knows of the others by their parts alone."""
    batch, everyone = random_batch(7), torch.ones(6).bool()
    expected = advantages_of(batch, everyone, normalization)
    shards = [torch.tensor([0, 4]), torch.tensor([], dtype=torch.int64), torch.tensor([1, 2, 3, 5])]
    for rows in shards:
        others = [random_parts(batch, other, normalization) for other in shards if other is not rows]
        asked = iter(range(9))

        def gather(part, asked=asked, others=others):
            k = next(asked)
            return torch.stack([part, *(parts[k] for parts in others)])

        own = {k: v[rows] for k, v in batch.items()}
        terminal = terminal_of(own, clamp=True).repeat_interleave(own["mask"].sum(1))
        got = em_token_advantages(
            terminal, own["values"][:, :-1][own["mask"]], normalization=normalization, gather=gather
        )
        torch.testing.assert_close(got, expected[rows][own["mask"]], atol=1e-6, rtol=1e-6)


def random_parts(batch: dict[str, Tensor], rows: Tensor, normalization: Normalization) -> list[Tensor]:
    """What a shard with these rows tells the others, the mean of all tokens being known to it."""
    raw = advantages_of(batch, torch.ones(6).bool(), "none")
    mask = batch["mask"]
    mean, own = raw[mask].double().mean(), raw[rows][mask[rows]].double()
    first = torch.stack([torch.tensor(float(len(own))).double(), own.sum(), own.square().sum()])
    return [first, (own - mean).square().sum()[None]]


@pytest.mark.parametrize(
    ("outcome", "message"),
    [([math.nan, math.nan], "labeled row 0 has outcome nan"), ([-1.0, math.nan], "labeled row 0 has outcome -1.0")],
)
def test_refuses_outcomes_that_would_be_silently_wrong(outcome, message):
    labeled = torch.tensor([True, False])
    with pytest.raises(ValueError, match=message):
        terminal_rewards(torch.tensor(outcome), labeled, torch.zeros(2), clamp=True)
    with pytest.raises(ValueError, match=message):
        target_states(torch.tensor(outcome), labeled, torch.ones(2).long(), position="post_last")


def test_a_row_without_tokens_has_neither_a_terminal_value_nor_a_target():
    with pytest.raises(ValueError, match="row 1 has no response token"):
        terminal_states(torch.tensor([1, 0]), "post_last")
    states = target_states(torch.ones(2), torch.ones(2).bool(), torch.tensor([1, 0]), position="post_last")
    assert states.tolist() == [2, 0]
