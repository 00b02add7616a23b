"""On one rank: what flat tokens say is, to the bit, what a padded table with a mask says."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_megatron.algorithm.advantages import VARIANCE_EPS, em_token_advantages
from tempo_megatron.algorithm.diagnostics import log_prob_difference
from tempo_megatron.algorithm.statistics import summary_statistics


@given(seed=st.integers(0, 2**31 - 1), rows=st.integers(1, 40), longest=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_flat_tokens_give_the_bits_of_a_table(seed: int, rows: int, longest: int) -> None:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=g)
    mask = torch.arange(longest) < lengths[:, None]
    table, other = torch.randn(rows, longest, generator=g), torch.randn(rows, longest, generator=g)
    terminal = torch.randn(rows, generator=g)

    chosen = table[mask].double()
    expected = [chosen.mean(), chosen.std(correction=0), chosen.min(), chosen.max()]
    assert list(summary_statistics("x", table[mask]).values()) == [float(x) for x in expected]

    d = table[mask].double() - other[mask].double()
    log_ess = 2 * d.logsumexp(0) - (2 * d).logsumexp(0) - math.log(d.numel())
    said = log_prob_difference(other[mask], table[mask])
    assert (said.mean_abs, said.max_abs) == (float(d.abs().mean()), float(d.abs().max()))
    assert (said.kl_k1, said.kl_k3) == (float(-d.mean()), float((d.expm1() - d).mean()))
    assert said.ess == min(float(log_ess.exp()), 1.0)

    raw = torch.where(mask, terminal[:, None] - table, 0.0)
    tokens = raw[mask].double()
    shift = tokens.mean()
    variance = (tokens - shift).square().sum() / max(tokens.numel() - 1, 1)
    whitened = torch.where(mask, (raw - shift) / (variance + VARIANCE_EPS).sqrt(), 0.0)
    scaled = raw / (tokens.square().mean() + VARIANCE_EPS).sqrt()
    flat = terminal.repeat_interleave(lengths), table[mask]
    assert torch.equal(em_token_advantages(*flat, normalization="whiten"), whitened[mask])
    assert torch.equal(em_token_advantages(*flat, normalization="scale"), scaled[mask])
