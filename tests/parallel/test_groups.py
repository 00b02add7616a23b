"""Backends of the groups that Megatron makes, by those of the world."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from megatron.core import parallel_state as mpu  # noqa: E402

from tempo_megatron.config.schema import ParallelConfig  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups, process_group  # noqa: E402


def backends(groups: ModelParallelGroups) -> set[str]:
    """Of every group of the layout, for tensors of the host and of a GPU."""
    found = set()
    for group in groups._globals["_global_process_group_list"]:
        if group is not None:
            pairs = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
            found.add(f"{pairs['cpu']} {pairs['cuda']}")
    return found


def test_groups_of_a_world_with_two_backends_have_that_of_the_gpu_alone() -> None:
    """As "cpu:gloo,cuda:nccl", with torch's own stand-in for a backend that is not here (which serves all devices)."""
    create = mpu.create_group
    with process_group("cpu:gloo,cuda:fake", dist.HashStore(), 0, 1):
        groups = ModelParallelGroups(ParallelConfig(), 60)
        assert backends(groups) == {"fake fake"}
        assert not groups.has_gloo
        with groups.active(), pytest.raises(AssertionError, match=r"group-gloo .* is not initialized"):
            mpu.get_data_parallel_group_gloo(with_context_parallel=True)
        assert dist.get_backend_config() == "cpu:gloo,cuda:fake"  # in which tensors of the host travel
    assert mpu.create_group is create


@pytest.mark.parametrize(("world", "has_gloo"), [("gloo", True), ("fake", False)])
def test_groups_of_a_world_with_one_backend_have_it(world: str, has_gloo: bool) -> None:
    with process_group(world, FakeStore() if world == "fake" else dist.HashStore(), 0, 1):
        groups = ModelParallelGroups(ParallelConfig(), 60)
        assert backends(groups) == {f"{world} {world}"}
        assert groups.has_gloo == has_gloo
        if has_gloo:
            with groups.active():
                of_host, own = (
                    get(with_context_parallel=True)
                    for get in (mpu.get_data_parallel_group_gloo, mpu.get_data_parallel_group)
                )
            assert of_host is not own
