"""Terminal rewards, token advantages and value targets of TEMPO (arXiv 2604.19295, Eq. 6, 11 and 12).

TEMPO is actor-critic with gamma = lambda = 1 in which a labeled response is worth its verified outcome and
an unlabeled one what the critic says of it at its end.  Nothing here carries a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

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


def response_lengths(mask: Tensor) -> Tensor:
    """``T_i`` as ``[N]`` int64; raises ValueError when a row's response tokens are not its first columns."""
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
        raise ValueError("the response mask must be True on the first T_i columns of each row and False after them")
    return lengths


def _check_values(values: Tensor, mask: Tensor) -> None:
    rows, longest = mask.shape
    if values.shape != (rows, longest + 1):
        raise ValueError(
            f"values have shape {tuple(values.shape)}; a mask of [{rows}, {longest}] needs one column more"
        )


@torch.no_grad()
def terminal_rewards(
    outcome: Tensor, labeled: Tensor, values: Tensor, mask: Tensor, *, position: TerminalPosition, clamp: bool
) -> Tensor:
    """What each response is worth at its end: the outcome where labeled, else the critic's value.

    Args:
        outcome: ``[N]`` in [0, 1]; ignored (NaN) on unlabeled rows.
        labeled: ``[N]`` bool.
        values: ``[N, L+1]`` float32.
        mask: ``[N, L]`` bool.
        position: ``post_last`` reads V(x, y), as the paper writes it; ``pre_last`` reads V(x, y_<T), before the
            last token (normally the end-of-sequence token), as the released code does.
        clamp: bound the critic's value to the range of outcomes, which leaves nothing to gain beyond 1.

    Returns:
        ``[N]`` float32.

    Raises:
        ValueError: a row without response tokens, a labeled row without an outcome, shapes that do not fit.
    """
    _check_values(values, mask)
    check_outcomes(outcome, labeled)
    lengths = response_lengths(mask)
    if (lengths == 0).any():
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"row {row} has no response token, so it has no terminal value")
    column = lengths if position == "post_last" else lengths - 1
    terminal = values.gather(1, column[:, None]).squeeze(1).float()
    if clamp:
        terminal = terminal.clamp(0.0, 1.0)
    return torch.where(labeled, outcome.float(), terminal)


@torch.no_grad()
def em_token_advantages(
    terminal: Tensor, values: Tensor, mask: Tensor, *, rows: Tensor, normalization: Normalization
) -> Tensor:
    """``A[i, t] = R_i - V(x_i, y_i,<t)``, normalized over the tokens that the actor trains on.

    This is GAE with gamma = lambda = 1 and terminal reward ``R_i`` (the ``em_token`` estimator).  Statistics are
    token-weighted and in float64: ``whiten`` subtracts the mean and divides by sqrt(var + 1e-8) with Bessel's
    correction (one lone token has variance 0); ``scale`` divides by sqrt(mean square + 1e-8) and so never changes
    a sign; ``none`` leaves the raw advantage.

    Args:
        terminal: ``[N]`` float32, ``R_i``.
        values: ``[N, L+1]`` float32.
        mask: ``[N, L]`` bool.
        rows: ``[N]`` bool, the rows that the actor trains on.
        normalization: ``whiten``, ``scale`` or ``none``.

    Returns:
        ``[N, L]`` float32, 0 off the mask and off ``rows``.
    """
    _check_values(values, mask)
    valid = mask & rows[:, None]
    raw = torch.where(valid, terminal.float()[:, None] - values[:, :-1].float(), 0.0)
    tokens = raw[valid].double()
    if normalization == "none" or not tokens.numel():
        return raw
    if normalization == "scale":
        return raw / (tokens.square().mean() + VARIANCE_EPS).sqrt()
    shift = tokens.mean()
    variance = (tokens - shift).square().sum() / max(tokens.numel() - 1, 1)
    return torch.where(valid, (raw - shift) / (variance + VARIANCE_EPS).sqrt(), 0.0)


@torch.no_grad()
def group_advantages(
    rewards: Tensor, group: Tensor, mask: Tensor, *, rows: Tensor, normalization: Normalization
) -> Tensor:
    """GRPO's ``A_i = (R_i - mean_g) / (std_g + 1e-6)`` on every token of row i (arXiv 2402.03300).

    Statistics are those of the group's rows that the actor trains on, in float64; the standard deviation has
    Bessel's correction. A group of one row, or of equal rewards, has advantage 0.

    Args:
        rewards: ``[N]`` float32, ``R_i``.
        group: ``[N]`` int64, the same number for the samples of one prompt draw.
        mask: ``[N, L]`` bool.
        rows: ``[N]`` bool, the rows that the actor trains on.
        normalization: ``whiten`` as above; ``none`` leaves out the division.

    Returns:
        ``[N, L]`` float32, 0 off the mask and off ``rows``.

    Raises:
        ValueError: ``scale``, which has no meaning within a group.
    """
    if normalization == "scale":
        raise ValueError("group advantages are whitened (whiten) or centred (none), not scaled")
    _, member = torch.unique(group, return_inverse=True)
    chosen = rows.double()
    zeros = torch.zeros(int(member.max()) + 1 if len(member) else 0, dtype=torch.float64, device=rewards.device)
    count = zeros.index_add(0, member, chosen)
    mean = zeros.index_add(0, member, rewards.double() * chosen) / count.clamp(min=1)
    centred = (rewards.double() - mean[member]) * chosen
    if normalization == "whiten":
        variance = zeros.index_add(0, member, centred.square()) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + GROUP_STD_EPS)[member]
    return torch.where(mask & rows[:, None], centred.float()[:, None], 0.0)


@torch.no_grad()
def value_targets(
    outcome: Tensor, labeled: Tensor, mask: Tensor, *, position: TerminalPosition
) -> tuple[Tensor, Tensor]:
    """The E-step's regression targets: the outcome at every state of a labeled response (paper Eq. 6).

    Args:
        outcome: ``[N]`` in [0, 1]; ignored (NaN) on unlabeled rows.
        labeled: ``[N]`` bool.
        mask: ``[N, L]`` bool.
        position: ``post_last`` also trains the state after the last token, because it is read as the reward.

    Returns:
        ``targets [N, L+1]`` float32, 0 where there is none, and ``target_mask [N, L+1]`` bool: columns
        ``0..T_i-1`` of labeled rows, and ``T_i`` with ``post_last``.  A row without tokens has no target.

    Raises:
        ValueError: a labeled row without an outcome.
    """
    check_outcomes(outcome, labeled)
    lengths = response_lengths(mask)
    states = lengths + 1 if position == "post_last" else lengths
    columns = torch.arange(mask.shape[1] + 1, device=mask.device)
    target_mask = (columns < states[:, None]) & (labeled & (lengths > 0))[:, None]
    return torch.where(target_mask, outcome.float()[:, None], 0.0), target_mask
