"""How a batch is dealt to optimizer steps."""

from __future__ import annotations

import pytest
import torch

from tempo_megatron.loop.batching import minibatches


@pytest.mark.parametrize(("prompts", "parts", "sizes"), [
    (8, 4, [2, 2, 2, 2]), (9, 4, [3, 2, 2, 2]), (10, 4, [3, 3, 2, 2]), (5, 4, [2, 1, 1, 1]), (3, 4, [1, 1, 1]),
    (5, 1, [5]),
])  # fmt: skip
def test_whole_prompts_in_as_many_steps_as_asked(prompts: int, parts: int, sizes: list[int]) -> None:
    group = torch.arange(prompts).repeat_interleave(3)
    dealt = list(minibatches(group, parts, 2, seed=7))
    assert [len(rows) // 3 for rows in dealt] == sizes * 2
    for one_pass in (dealt[: len(sizes)], dealt[len(sizes) :]):
        assert torch.cat(one_pass).sort().values.tolist() == list(range(3 * prompts))
        for rows in one_pass:
            assert all((group[rows] == g).sum() == 3 for g in group[rows].unique())
