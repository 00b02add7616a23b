"""Tensor-parallel ranks of test_log_probs; and what it compares with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from tempo_megatron.model.log_probs import vocab_parallel_log_probs
from tempo_megatron.parallel.distributed import start


@dataclass(frozen=True)
class Case:
    """Tokens, an output weight with rows of padding, and the gradients of what comes out (None: it is not used)."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    vocab_size: int
    temperature: float
    by_log_prob: Tensor | None
    by_entropy: Tensor | None


def case_of(n: int, hidden: int, vocab: int, padding: int, temperature: float, by: str, seed: int) -> Case:
    draw = torch.Generator().manual_seed(seed)
    return Case(
        torch.randn(n, hidden, generator=draw),
        torch.randn(vocab + padding, hidden, generator=draw) / hidden**0.5,
        torch.randint(vocab, (n,), generator=draw),
        vocab,
        temperature,
        torch.randn(n, generator=draw) if by != "entropy" else None,
        torch.randn(n, generator=draw) if by != "log_probs" else None,
    )


def plain(case: Case, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    every = (hidden @ weight[: case.vocab_size].t() / case.temperature).log_softmax(-1)
    return every.gather(1, targets.unsqueeze(1)).squeeze(1), -(every.exp() * every).sum(-1)


def gradients(case: Case, function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Log-probabilities, entropies, and the gradients of hidden states and weight."""
    inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight)]
    outputs = function(*inputs, case.targets)
    used = [(x, by) for x, by in zip(outputs, (case.by_log_prob, case.by_entropy), strict=True) if by is not None]
    torch.autograd.backward([x for x, _ in used], [by.to(x.dtype) for x, by in used])
    grads = [x.grad for x in inputs if x.grad is not None]
    assert len(grads) == len(inputs)
    return [*(x.detach() for x in outputs), *grads]


def assert_equal(got: list[Tensor], wanted: list[Tensor], within: float = 1e-6) -> None:
    """Within so much of 1, or of the largest number of a tensor that has larger ones."""
    for x, y in zip(got, wanted, strict=True):
        largest = y.abs().max().item() if y.numel() else 0.0
        torch.testing.assert_close(x, y, rtol=0, atol=within * max(1.0, largest))


def check(case: Case, group: dist.ProcessGroup, chunk: int | None) -> None:
    """With this rank's rows of the weight; gradients of the hidden states are summed over the ranks."""
    rows = slice(*(len(case.weight) // group.size() * (group.rank() + k) for k in (0, 1)))
    mine = replace(case, weight=case.weight[rows])
    function = partial(
        vocab_parallel_log_probs,
        vocab_size=case.vocab_size,
        tp_group=group,
        temperature=case.temperature,
        chunk=chunk,
    )
    log_probs, entropy, by_hidden, by_weight = gradients(mine, function)
    dist.all_reduce(by_hidden, group=group)
    wanted = gradients(case, partial(plain, case))
    wanted[3] = wanted[3][rows]
    assert_equal([log_probs, entropy, by_hidden, by_weight], wanted)


def main() -> None:
    start(threads=1, timeout_s=60)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    for tp, group in groups.items():
        assert group is not None
        for by, chunk, n in product(("log_probs", "entropy", "both"), (1, 5, 12, 50, None), (0, 12)):
            check(case_of(n, 6, 37, -37 % tp, 0.7, by, n), group, chunk)
        check(case_of(9, 6, 5, -5 % tp, 1.0, "both", 0), group, 4)  # of 4 ranks the last has padding only
        far = case_of(3, 1, 8, 0, 1.0, "log_probs", 0)  # e**-400 is 0 in float32
        peaked = replace(far, hidden=torch.ones(3, 1), weight=torch.arange(8.0).unsqueeze(1) * 100)
        check(peaked, group, None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
