"""Rows into packs and outputs back: every response token is predicted once, at the right place, in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempo_megatron.errors import TempoError
from tempo_megatron.model.layers import context_positions
from tempo_megatron.training import microbatch
from tempo_megatron.training.microbatch import MicroBatch, Sequences, make_microbatches

#: (prompt, response) lengths; a prompt has a token at least.
LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8)), max_size=12)


@pytest.fixture(autouse=True, scope="module")
def _on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(microbatch, "to_device", lambda tensor: tensor)
        yield


def rows_of(lengths: list[tuple[int, int]]) -> Sequences:
    """Every token of the batch another number, from 1: padding is 0."""
    ids = iter(range(1, 1 + sum(map(sum, lengths))))
    rows = [([next(ids) for _ in range(p)], [next(ids) for _ in range(r)]) for p, r in lengths]
    return Sequences.of([p for p, _ in rows], [r for _, r in rows])


@dataclass(frozen=True)
class Settings:
    max_tokens: int = 40
    shards: int = 1
    cp: int = 1
    align: int = 1
    multiple: int = 1
    equal_lengths: bool = False

    def pack(self, sequences: Sequences, shard: int) -> list[list[MicroBatch]]:
        """[micro-batch][context rank] of one data-parallel shard."""
        homes = sequences.dealt(self.shards, 64)
        by_rank = [
            make_microbatches(
                sequences,
                homes,
                self.max_tokens,
                (shard, self.shards),
                (rank, self.cp),
                align=self.align,
                multiple=self.multiple,
                equal_lengths=self.equal_lengths,
            )
            for rank in range(self.cp)
        ]
        return [list(ranks) for ranks in zip(*by_rank, strict=True)]


SETTINGS = st.builds(
    Settings,
    max_tokens=st.integers(17, 60),
    shards=st.integers(1, 3),
    cp=st.sampled_from([1, 2, 4]),
    align=st.sampled_from([1, 2, 4]),
    multiple=st.integers(1, 3),
    equal_lengths=st.booleans(),
)


class ContextGroup:
    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def gathered(ranks: list[MicroBatch], outputs: list[Tensor]) -> Tensor:
    """``MicroBatch.gather`` as every context rank does it, the collective replaced by what it does; all agree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(microbatch, "gather_from_sequence_parallel_region", lambda local, **_: torch.cat(outputs))
        every = [mb.gather(own, ContextGroup(len(ranks))) for mb, own in zip(ranks, outputs, strict=True)]
    assert all(torch.equal(each, every[0]) for each in every)
    return every[0]


@given(lengths=LENGTHS, settings=SETTINGS)
def test_every_response_token_is_predicted_once_and_comes_back_to_its_place(
    lengths: list[tuple[int, int]], settings: Settings
) -> None:
    sequences = rows_of(lengths)
    seen: list[int] = []
    for shard in range(settings.shards):
        for ranks in settings.pack(sequences, shard):
            mb = ranks[0]
            seen += mb.rows
            assert all(other.rows == mb.rows for other in ranks)
            assert sum(sequences.lengths[r] for r in mb.rows) <= settings.max_tokens

            # a model whose output is the token itself: what stands at y_c's place is the token before it
            before = gathered(ranks, [each.input_ids[0].float() for each in ranks])
            for final_state in (False, True):
                found = mb.by_row(before, final_state=final_state)
                for got, row in zip(found.tolist(), mb.rows, strict=True):
                    prompt, response = sequences.prompts[row], sequences.responses[row].tolist()
                    width = len(response) + final_state
                    assert got[:width] == [*prompt, *response][len(prompt) - 1 :][:width]
                    assert not any(got[width:])

            # what the actor does: outputs where a response token is predicted, at the targets
            flat = [
                torch.zeros(each.input_ids.shape[1]).index_put((each.predicting,), each.targets.float())
                for each in ranks
            ]
            for got, row in zip(mb.by_row(gathered(ranks, flat), final_state=False).tolist(), mb.rows, strict=True):
                assert got[: len(sequences.responses[row])] == sequences.responses[row].tolist()
            predicted = torch.cat([each.targets for each in ranks]).tolist()
            assert sorted(predicted) == sorted(token for row in mb.rows for token in sequences.responses[row].tolist())
    assert sorted(seen) == list(range(len(sequences)))


@given(lengths=LENGTHS, settings=SETTINGS)
def test_packs_have_the_shapes_that_layouts_need(lengths: list[tuple[int, int]], settings: Settings) -> None:
    sequences = rows_of(lengths)
    cp = settings.cp
    counts = []
    for shard in range(settings.shards):
        packs = settings.pack(sequences, shard)
        counts.append(len(packs))
        if settings.equal_lengths:
            assert len({ranks[0].tokens for ranks in packs}) == 1
        for ranks in packs:
            spans = ranks[0].packed.cu_seqlens_q.diff().tolist()
            assert sum(spans) == ranks[0].tokens > 0
            assert ranks[0].packed.max_seqlen_q == max(spans)
            if cp > 1:
                assert all(span % (2 * cp) == 0 for span in spans)
            for rank, mb in enumerate(ranks):
                assert mb.tokens == ranks[0].tokens
                assert mb.input_ids.shape == mb.position_ids.shape == (1, mb.tokens // cp)
                assert mb.tokens // cp % settings.align == 0
                expected = torch.cat([context_positions(span, cp, rank) for span in spans])
                assert torch.equal(mb.position_ids[0], expected)
    assert len(set(counts)) == 1
    assert counts[0] >= 1
    assert counts[0] % settings.multiple == 0


def test_order_of_a_pack_is_by_length() -> None:
    """Neighbours of one length are attended to as one batch."""
    (ranks,) = Settings().pack(rows_of([(3, 2), (1, 1), (2, 3), (1, 0), (4, 1)]), 0)
    assert ranks[0].rows == [3, 1, 0, 2, 4]
    assert ranks[0].packed.cu_seqlens_q.diff().tolist() == [1, 2, 5, 5, 5]


def test_padding_is_a_sequence_of_its_own() -> None:
    (ranks,) = Settings(align=4).pack(rows_of([(3, 2), (1, 1)]), 0)
    mb = ranks[0]
    assert mb.packed.cu_seqlens_q.diff().tolist() == [2, 5, 1]
    assert mb.input_ids.tolist() == [[6, 7, 1, 2, 3, 4, 5, 0]]
    assert mb.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4, 0]]
    assert (mb.predicting.tolist(), mb.targets.tolist()) == ([0, 4, 5], [7, 4, 5])


def test_context_rank_holds_the_first_and_the_last_chunk_of_two() -> None:
    """Seven tokens are padded to eight; rank 0 of 2 holds chunks 0 and 3, rank 1 chunks 1 and 2."""
    (ranks,) = Settings(cp=2).pack(rows_of([(3, 4)]), 0)
    assert [mb.input_ids.tolist() for mb in ranks] == [[[1, 2, 7, 0]], [[3, 4, 5, 6]]]
    assert [mb.position_ids.tolist() for mb in ranks] == [[[0, 1, 6, 7]], [[2, 3, 4, 5]]]
    assert [mb.predicting.tolist() for mb in ranks] == [[], [0, 1, 2, 3]]
    assert ranks[1].targets.tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_packs_without_rows(cp: int) -> None:
    """Ranks without rows, and fillers up to the multiple, run a pack of padding alone."""
    settings = Settings(shards=2, cp=cp, multiple=3, align=2)
    packs = [ranks for shard in range(2) for ranks in settings.pack(rows_of([(2, 3)]), shard)]
    assert len(packs) == 6
    empty = [ranks for ranks in packs if not ranks[0].rows]
    assert len(empty) == 5
    for ranks in empty:
        for mb in ranks:
            assert mb.tokens == (2 if cp == 1 else 4 * cp)
            assert not mb.input_ids.any()
            assert len(mb.predicting) == len(mb.targets) == len(mb.first) == 0
            assert mb.by_row(torch.ones(mb.tokens), final_state=True).shape == (0, 0)


def test_gradients_reach_the_tokens_that_are_read() -> None:
    (ranks,) = Settings(align=4).pack(rows_of([(3, 2), (1, 1)]), 0)
    outputs = torch.ones(ranks[0].tokens, requires_grad=True)
    (ranks[0].by_row(outputs, final_state=True) * torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]])).sum().backward()
    assert outputs.grad is not None
    assert outputs.grad.tolist() == [1.0, 2.0, 0.0, 0.0, 3.0, 4.0, 5.0, 0.0]  # 9 weighs what is beyond the row


def test_a_row_that_no_pack_holds_is_told() -> None:
    with pytest.raises(TempoError, match=r"max_tokens_per_microbatch: 6 is too small for a sequence of 7 tokens"):
        Settings(max_tokens=6).pack(rows_of([(3, 4)]), 0)
