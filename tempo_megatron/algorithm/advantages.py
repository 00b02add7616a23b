"""Terminal rewards, token advantages and value targets of TEMPO (arXiv 2604.19295, Eq. 6, 11 and 12).

TEMPO is actor-critic with gamma = lambda = 1 in which a labeled response is worth its verified outcome and
an unlabeled one what the critic says of it at its end.  Nothing here carries a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tempo_megatron.algorithm.statistics import Gather, alone, parts_of

TerminalPosition = Literal["pre_last", "post_last"]
Normalization = Literal["whiten", "scale", "none"]

#: Added to the variance (or second moment), as in the released code: equal raw advantages stay finite.
VARIANCE_EPS = 1e-8
#: Added to a group's standard deviation, as in GRPO's implementations.
GROUP_STD_EPS = 1e-6


def check_outcomes(outcome: Tensor, labeled: Tensor) -> None:
    """Raises ValueError unless every labeled row has an outcome in [0, 1] (so neither NaN nor -1)."""
    bad = labeled & ~((outcome >= 0) & (outcome <= 1))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"labeled row {row} has outcome {float(outcome[row])}; a verified outcome lies in [0, 1]")


@torch.no_grad()
def terminal_states(lengths: Tensor, position: TerminalPosition) -> Tensor:
    """``[N]`` int64: the state at which each response of ``lengths [N]`` tokens is judged.

    ``post_last`` reads V(x, y), state ``T_i``, as the paper writes it; ``pre_last`` reads V(x, y_<T), state
    ``T_i - 1``, before the last token (normally the end-of-sequence token), as the released code does.

    Raises:
        ValueError: a row without response tokens.
    """
    if (lengths == 0).any():
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"row {row} has no response token, so it has no terminal value")
    return lengths if position == "post_last" else lengths - 1


@torch.no_grad()
def terminal_rewards(outcome: Tensor, labeled: Tensor, terminal_values: Tensor, *, clamp: bool) -> Tensor:
    """What each response is worth at its end: the outcome where labeled, else the critic's value.

    Args:
        outcome: ``[N]`` in [0, 1]; ignored (NaN) on unlabeled rows.
        labeled: ``[N]`` bool.
        terminal_values: ``[N]`` float32, at the :func:`terminal_states`.
        clamp: bound the critic's value to the range of outcomes, which leaves nothing to gain beyond 1.

    Returns:
        ``[N]`` float32.

    Raises:
        ValueError: a labeled row without an outcome.
    """
    check_outcomes(outcome, labeled)
    terminal = terminal_values.float()
    if clamp:
        terminal = terminal.clamp(0.0, 1.0)
    return torch.where(labeled, outcome.float(), terminal)


@torch.no_grad()
def em_token_advantages(
    terminal: Tensor, baselines: Tensor, *, normalization: Normalization, gather: Gather = alone
) -> Tensor:
    """``A[i, t] = R_i - V(x_i, y_i,<t)``, normalized over the tokens that the actor trains on.

    This is GAE with gamma = lambda = 1 and terminal reward ``R_i`` (the ``em_token`` estimator).  Statistics are
    token-weighted and in float64: ``whiten`` subtracts the mean and divides by sqrt(var + 1e-8) with Bessel's
    correction (one lone token has variance 0); ``scale`` divides by sqrt(mean square + 1e-8) and so never changes
    a sign; ``none`` leaves the raw advantage.

    Args:
        terminal: ``[T]`` float32, ``R_i`` at each of this rank's tokens.
        baselines: ``[T]`` float32, ``V(x_i, y_i,<t)`` of them.
        normalization: ``whiten``, ``scale`` or ``none``.
        gather: brings in the tokens of other shards.

    Returns:
        ``[T]`` float32.
    """
    raw = terminal.float() - baselines.float()
    if normalization == "none":
        return raw
    tokens = raw.double()
    count, total, squares = parts_of([float(len(tokens)), tokens.sum(), tokens.square().sum()], gather).sum(0)
    if not count:
        return raw
    if normalization == "scale":
        return raw / (squares / count + VARIANCE_EPS).sqrt()
    shift = total / count
    (about_mean,) = parts_of([(tokens - shift).square().sum()], gather).sum(0)
    variance = about_mean / (count - 1).clamp(min=1)
    return (raw - shift) / (variance + VARIANCE_EPS).sqrt()


@torch.no_grad()
def group_advantages(rewards: Tensor, group: Tensor, *, normalization: Normalization) -> Tensor:
    """GRPO's ``A_i = (R_i - mean_g) / (std_g + 1e-6)``, that of every token of row i (arXiv 2402.03300).

    Statistics are in float64; the standard deviation has Bessel's correction. A group of one row, or of equal
    rewards, has advantage 0.

    Args:
        rewards: ``[N]`` float32, ``R_i`` of the rows that the actor trains on.
        group: ``[N]`` int64, the same number for the samples of one prompt draw.
        normalization: ``whiten`` as above; ``none`` leaves out the division.

    Returns:
        ``[N]`` float32.

    Raises:
        ValueError: ``scale``, which has no meaning within a group.
    """
    if normalization == "scale":
        raise ValueError("group advantages are whitened (whiten) or centred (none), not scaled")
    _, member = torch.unique(group, return_inverse=True)
    zeros = torch.zeros(int(member.max()) + 1 if len(member) else 0, dtype=torch.float64, device=rewards.device)
    count = zeros.index_add(0, member, torch.ones_like(rewards, dtype=torch.float64))
    mean = zeros.index_add(0, member, rewards.double()) / count.clamp(min=1)
    centred = rewards.double() - mean[member]
    if normalization == "whiten":
        variance = zeros.index_add(0, member, centred.square()) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + GROUP_STD_EPS)[member]
    return centred.float()


@torch.no_grad()
def target_states(outcome: Tensor, labeled: Tensor, lengths: Tensor, *, position: TerminalPosition) -> Tensor:
    """The E-step's regression targets: the outcome at the first so many states of each response (paper Eq. 6).

    Args:
        outcome: ``[N]`` in [0, 1]; ignored (NaN) on unlabeled rows.
        labeled: ``[N]`` bool.
        lengths: ``[N]`` int64, ``T_i``.
        position: ``post_last`` also trains the state after the last token, because it is read as the reward.

    Returns:
        ``[N]`` int64: ``T_i`` on labeled rows, ``T_i + 1`` with ``post_last``; 0 on the others and on rows without
        tokens, which have no target.

    Raises:
        ValueError: a labeled row without an outcome.
    """
    check_outcomes(outcome, labeled)
    states = lengths + 1 if position == "post_last" else lengths
    return torch.where(labeled & (lengths > 0), states, 0)
