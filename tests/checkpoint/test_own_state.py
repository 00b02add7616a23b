"""Each rank's rectangles of the optimizer's state: Megatron's tensors to the bit, whole together, bounded in memory."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402

from tempo_megatron.checkpoint.own_state import _rectangles_of  # noqa: E402
from tempo_megatron.errors import TempoError  # noqa: E402
from tests.launching import launch_ranks  # noqa: E402


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("own")
    launch_ranks("tests.checkpoint.own_state_worker", folder, nproc=4, timeout_s=200).check()
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.slow(60)
@pytest.mark.timeout(400)
def test_megatrons_own_checkpoints_and_ours_are_one(ranks: list[dict[str, Any]]) -> None:
    """Bit for bit: the same tensors are stored, either loads what the other saved, and equal states are equal files."""
    for line in ranks:
        for case in line["cases"]:
            assert case["moments"] >= 10, case
            told = {name: value for name, value in case.items() if name not in ("case", "moments")}
            assert set(told.values()) == {True}, case
            assert ("masters of a float32 role" in told) == ("bfloat16" in case["case"])


@pytest.mark.slow(60)
@pytest.mark.timeout(400)
def test_rectangles_that_are_no_whole_are_told_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    found = [line["faults"] for line in ranks]
    assert found == found[:1] * 4
    key = r".*/faults/\w+: tensor optimizer\.state\.exp_avg\.\S+ of shape \[.*\] would not be whole: "
    key += r"parts have (\d+) elements of (\d+)"
    left_out = re.fullmatch(key, found[0]["leave_out"])
    assert left_out is not None and int(left_out[1]) < int(left_out[2]), found[0]["leave_out"]
    double = re.fullmatch(key, found[0]["double"])
    assert double is not None and int(double[1]) > int(double[2]), found[0]["double"]
    shift = re.fullmatch(key + ", but some twice or beyond it and others not at all", found[0]["shift"])
    assert shift is not None and shift[1] == shift[2], found[0]["shift"]


@pytest.mark.slow(60)
@pytest.mark.timeout(400)
def test_a_load_that_would_not_find_all_is_refused(ranks: list[dict[str, Any]]) -> None:
    key = "tensor optimizer.state.exp_avg_sq.decoder.layers.mlp.linear_fc1.weight"
    for line in ranks:
        told = line["faults"]
        assert re.fullmatch(
            rf".*/whole: {key} of shape \[4, 160, 48\] is not whole: parts have \d+ elements of 30720",
            told["a lost chunk"],
        )
        assert told["a lost tensor"].endswith(
            f"/whole: {key} is missing; the checkpoint is not whole or of another model"
        )


@pytest.mark.slow(60)
@pytest.mark.timeout(400)
def test_host_memory_is_bounded_by_what_a_rank_owns(ranks: list[dict[str, Any]]) -> None:
    """Four data-parallel ranks. A save takes what the rank writes, a load about its states again, Megatron's own save
    nine times these.
    """
    for line in ranks:
        found = line["memory"]
        whole = 12 * found["parameters"]
        print({name: round(value / found["own"], 2) for name, value in found.items() if name != "parameters"})
        assert found["own"] == pytest.approx(whole / 4, rel=0.01)
        assert found["own"] <= found["staged"] <= found["own"] + whole / 12  # and of the bfloat16 weights a share
        assert found["save"] < 1.5 * found["staged"]
        assert found["load"] < 1.5 * found["own"]
        assert found["gathered"] > 2 * whole  # so that the measure would see it


# ---------------------------------------------------------------- what is saved of a parameter


def gate_and_up(parameter: torch.Tensor, *, twist: Any = lambda half: half) -> ShardedTensorFactory:
    """As ``apply_swiglu_sharded_factory`` has it for the second of three layers and the first of two ranks."""

    def build(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(
                key, twist(half), (0, 1, 3), (1, 2 * number, 4), replica_id=replica_id, prepend_axis_num=1
            )
            for number, half in enumerate(torch.chunk(data, 2))
        ]

    return ShardedTensorFactory("fc1", parameter, build, torch.cat, (0, 0, 3))


def test_a_factorys_tensors_are_found_in_the_parameter() -> None:
    parameter = torch.arange(6 * 5.0).reshape(6, 5)
    whole = torch.full((3, 12, 5), -1.0)
    for start, stop in ((0, 7), (7, 18), (18, 30)):
        own = parameter.flatten()[start:stop].clone()
        for part in _rectangles_of(gate_and_up(parameter), "exp_avg", own, start, stop):
            assert part.key == "optimizer.state.exp_avg.fc1" and part.replica_id == (0, 0)
            assert part.global_shape == whole.shape and not part.has_regular_grid
            assert part.data.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
            place = tuple(slice(at, at + n) for at, n in zip(part.global_offset, part.local_shape, strict=True))
            assert (whole[place] == -1).all()
            whole[place] = part.data
    assert torch.equal(whole[1, :3], parameter[:3]) and torch.equal(whole[1, 6:9], parameter[3:])
    assert (whole != -1).sum() == parameter.numel()


def test_what_is_no_part_of_the_parameter_is_refused() -> None:
    parameter = torch.zeros(6, 5)
    key = r"optimizer\.state\.param\.fc1"
    with pytest.raises(TempoError, match=f"^{key}: is computed from the parameter fc1, not a part of it$"):
        _rectangles_of(gate_and_up(parameter, twist=lambda half: half * 2), "param", torch.zeros(30), 0, 30)
    told = f"^{key}: the model's tensors have 20 of the 30 elements that this rank owns$"
    with pytest.raises(TempoError, match=told):
        _rectangles_of(gate_and_up(parameter, twist=lambda half: half[:2]), "param", torch.zeros(30), 0, 30)
    with pytest.raises(TempoError, match=f"^{key}: cannot be saved in parts: a view of shape .* has no order$"):
        _rectangles_of(
            gate_and_up(parameter, twist=lambda half: half[:1].expand(3, 5)), "param", torch.zeros(30), 0, 30
        )
    told = f"^{key}: the optimizer holds torch.bfloat16, of shape .30.; checkpoints have float32, here of 30 elements$"
    with pytest.raises(TempoError, match=told):
        _rectangles_of(gate_and_up(parameter), "param", torch.zeros(30, dtype=torch.bfloat16), 0, 30)
