"""Log-probabilities without logits: equal to log_softmax of the logits, gradients too; memory that n has no part in."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tempo_megatron.model.log_probs import vocab_parallel_log_probs
from tests.launching import launch_ranks
from tests.model.log_probs_worker import Case, assert_equal, case_of, gradients, plain


def ours(case: Case, chunk: int | None) -> Callable[..., tuple[Tensor, Tensor]]:
    return partial(
        vocab_parallel_log_probs,
        vocab_size=case.vocab_size,
        tp_group=None,
        temperature=case.temperature,
        chunk=chunk,
    )


@given(
    n=st.integers(0, 40),
    hidden=st.integers(1, 12),
    vocab=st.integers(1, 60),
    padding=st.integers(0, 3),
    chunk=st.one_of(st.none(), st.integers(1, 45)),
    temperature=st.sampled_from([1.0, 0.7]),
    by=st.sampled_from(["log_probs", "entropy", "both"]),
    seed=st.integers(0, 2**31),
)
def test_equal_the_plain_ones(
    n: int, hidden: int, vocab: int, padding: int, chunk: int | None, temperature: float, by: str, seed: int
) -> None:
    """Each is up to 1.3e-6 from what float64 gives (6,000 random cases): their rounding is not that of the other."""
    case = case_of(n, hidden, vocab, padding, temperature, by, seed)
    wanted = gradients(case, partial(plain, case))
    assert_equal(gradients(case, ours(case, chunk)), wanted, within=2.5e-6)


@pytest.mark.parametrize("by", ["log_probs", "entropy", "both"])
def test_equal_the_plain_ones_within_a_millionth(by: str) -> None:
    for n, vocab, chunk in ((40, 60, None), (40, 60, 7), (1000, 500, 128)):
        case = case_of(n, 12, vocab, 3, 0.7, by, 0)
        assert_equal(gradients(case, ours(case, chunk)), gradients(case, partial(plain, case)))


def test_gradients_of_small_differences() -> None:
    case = case_of(5, 3, 7, 1, 0.7, "both", 0)
    inputs = [x.double().requires_grad_() for x in (case.hidden, case.weight)]
    for chunk in (2, None):
        function = ours(case, chunk)
        assert torch.autograd.gradcheck(lambda h, w, f=function: f(h, w, case.targets), inputs)


def test_bfloat16_is_as_near_as_its_logits() -> None:
    case = case_of(64, 32, 50, 2, 1.0, "both", 0)
    half = replace(case, hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
    exact = replace(case, hidden=half.hidden.double(), weight=half.weight.double())
    wanted = gradients(exact, partial(plain, exact))
    for chunk in (7, None):
        got = gradients(half, ours(half, chunk))
        assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
        for x, y in zip(got, wanted, strict=True):
            assert (x.double() - y).norm() <= 0.01 * y.norm()


def test_a_sure_token_keeps_its_gradient() -> None:
    """1 - p of a probability near 1 is no difference of two rounded numbers, also in bfloat16."""
    weight = torch.tensor([[8.0], [0.0]]).bfloat16()
    hidden = torch.ones(1, 1).bfloat16().requires_grad_()
    log_prob, _ = vocab_parallel_log_probs(
        hidden, weight, torch.tensor([0]), vocab_size=2, tp_group=None, temperature=1.0
    )
    log_prob.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.item() == pytest.approx(8 * torch.sigmoid(torch.tensor(-8.0)).item(), rel=0.01)


@pytest.mark.slow
def test_tensor_parallel_ranks_equal_the_plain_ones() -> None:
    """TP 2 and 4, several chunks, a rank that has nothing but padding, a target far below another rank's columns."""
    launch_ranks("tests.model.log_probs_worker", nproc=4, timeout_s=60).check()


class Meter(TorchDispatchMode):
    """Bytes of the storages that operators made within the block: of those that live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given_in = {id(s) for s in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            if id(storage) not in given_in | self.known.keys():
                self.known[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self._drop, id(storage))
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    def _drop(self, key: int) -> None:
        self.now -= self.known.pop(key)


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_the_module_says(dtype: torch.dtype) -> None:
    hidden, vocab, chunk = 4, 1000, 8
    once = 4 * chunk * vocab
    weight = torch.randn(vocab, hidden, dtype=dtype).requires_grad_()
    peaks = []
    for n in (64, 1024):
        states = torch.randn(n, hidden, dtype=dtype).requires_grad_()
        targets = torch.randint(vocab, (n,))
        with Meter() as meter:
            outputs = vocab_parallel_log_probs(
                states, weight, targets, vocab_size=vocab, tp_group=None, temperature=1.0, chunk=chunk
            )
            of_tokens = 4 * n * (hidden + 12)
            assert meter.peak <= 2.6 * once + of_tokens
            assert once <= meter.now <= 1.1 * once + of_tokens
            meter.peak = meter.now
            torch.autograd.backward([x.sum() for x in outputs])
            assert meter.peak <= 3.6 * once + 4 * vocab * hidden * 2 + of_tokens
            peaks.append(meter.peak - of_tokens)
            del outputs
            assert meter.now <= 4 * hidden * (n + vocab) * 2
    assert peaks[1] <= peaks[0]
