"""Autograd without numbers frees what torch frees; schedules keep as many micro-batches as Megatron's."""

from __future__ import annotations

import pytest

from tempo_megatron.config.schema import OptimizerConfig, ParallelConfig, RoleConfig
from tempo_megatron.planner.operations import Operations
from tempo_megatron.planner.parameters import Parameter, RoleLayout
from tempo_megatron.planner.schedule import steps
from tempo_megatron.planner.shadow import Meter, Value, backward, leaf
from tempo_megatron.planner.sizes import ModelSizes
from tempo_megatron.planner.state import StateBytes, _buckets, state_at

N = 1000


@pytest.fixture
def ops() -> Operations:
    return Operations(Meter(), 4)


def test_what_nobody_refers_to_is_gone(ops: Operations) -> None:
    x = Value(ops.new(N))
    y = ops.silu(x, N)  # needs no gradient: nothing is saved
    assert ops.meter.now == 8 * N
    del x
    assert ops.meter.now == 4 * N
    del y
    assert (ops.meter.now, ops.meter.peak) == (0, 8 * N)


def test_saved_tensors_stay_until_their_backward_has_run(ops: Operations) -> None:
    x, found = leaf(ops.meter, ops.new(N))
    y = ops.silu(ops.silu(x, N), N)
    assert ops.meter.now == 12 * N  # x, the first output (the second node's), the second
    ops.meter.restart()
    backward(y, ops.new(N))
    # the gradient of the output and of what was saved beside it; then those of x alone
    assert ops.meter.peak == 20 * N
    del x, y
    assert ops.meter.now == 4 * N == found[0].nbytes


def test_gradients_of_one_tensor_wait_for_each_other_in_one_place(ops: Operations) -> None:
    x, found = leaf(ops.meter, ops.new(N))
    y = ops.add(ops.silu(x, N), ops.silu(x, N), N)
    backward(y, ops.new(N))
    assert len(found) == 1


def test_a_checkpoint_keeps_its_input_and_makes_the_rest_again(ops: Operations) -> None:
    def two(x: Value) -> Value:
        return ops.silu(ops.silu(x, N), N)

    x, found = leaf(ops.meter, ops.new(N))
    y = ops.checkpoint(two, x)
    assert ops.meter.now == 8 * N  # input and output
    ops.meter.restart()
    backward(y, ops.new(N))
    assert ops.meter.peak > 12 * N
    assert len(found) == 1


@pytest.mark.parametrize(("stage", "most"), [(0, 4), (1, 3), (3, 1)])
def test_one_forward_one_backward(stage: int, most: int) -> None:
    order = steps(1, 4, stage, 8)
    live = [sum(1 if forward else -1 for _, forward in order[: i + 1]) for i in range(len(order))]
    assert max(live) == most
    assert live[-1] == 0
    assert len(order) == 16


@pytest.mark.parametrize(("stage", "most"), [(0, 11), (3, 5)])
def test_interleaved_stages(stage: int, most: int) -> None:
    """Ahead: twice the stages behind this one, and all chunks but the last of one group (schedules.py)."""
    order = steps(2, 4, stage, 8)
    live = [sum(1 if forward else -1 for _, forward in order[: i + 1]) for i in range(len(order))]
    assert max(live) == most
    assert live[-1] == 0
    assert [chunk for chunk, forward in order if forward][:8] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [chunk for chunk, forward in order if not forward][:4] == [1, 1, 1, 1]


def test_buckets_are_cut_where_gradients_are_reduced_early() -> None:
    """40 million elements at least, aligned to 64; each ends at a multiple of 128 and of its ranks."""
    parameters = [Parameter(30_000_001), Parameter(30_000_001), Parameter(5)]
    overlapped = OptimizerConfig(overlap_grad_reduce=True)
    found = _buckets(parameters, overlapped, 0, 3)
    assert [(b.start, b.end) for b in found] == [(0, 60_000_384)]
    assert found[0].parameters == ((0, 5), (64, 30_000_065), (30_000_128, 60_000_129))
    found = _buckets([*parameters, Parameter(40_000_000)], overlapped, 0, 3)
    assert [b.start for b in found] == [0, 40_000_128]
    assert len(_buckets([*parameters, Parameter(40_000_000)], overlapped, 1, 3)) == 1  # not behind the first stage
    assert sum(b.share(3, r) for b in found for r in range(3)) == 100_000_007


def test_experts_are_shared_by_other_ranks_than_the_rest() -> None:
    values = {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64,
        "max_position_embeddings": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    }  # fmt: skip
    sizes = ModelSizes.of(values)

    def state(experts: int) -> StateBytes:
        role = RoleConfig(init="-", dtype="float32", parallel=ParallelConfig(expert_model_parallel_size=experts))
        layout = RoleLayout(role.parallel, 4)
        return state_at(sizes, "actor", role, layout, layout.place(0))

    expert = 3 * 64 * 64
    assert state(1).gradients - state(4).gradients == 4 * 3 * expert  # four experts here, or one
    assert state(1).moments == state(4).moments  # a fourth of four, or all of one
