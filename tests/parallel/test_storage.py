"""Storage goes and comes back under its tensors; what is not there is refused by name."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from tempo_megatron.errors import RunError
from tempo_megatron.parallel.parts import Part, State, awake
from tempo_megatron.parallel.storage import FileStore, StoredTensors, storages_of

MIB = 1 << 20


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def part_of(tensors: list[torch.Tensor], folder: Path | None, name: str = "actor.weights") -> Part:
    store = None if folder is None else FileStore(lambda: folder)
    return Part(name, StoredTensors(lambda: storages_of(tensors), store))


def test_contents_come_back_under_every_view(tmp_path: Path) -> None:
    buffer, alone = torch.randn(1000), torch.randn(3, 5).to(torch.bfloat16)
    parameter, shard = buffer[10:110].view(10, 10), buffer[500:]
    before = [t.clone() for t in (buffer, alone, parameter, shard)]
    part = part_of([buffer, alone, parameter], tmp_path)
    for _ in range(2):
        assert part.resident_bytes() == 1000 * 4 + 15 * 2
        part.sleep()
        assert part.state is State.ASLEEP and part.resident_bytes() == 0 and part.nbytes() == 4030
        assert buffer.untyped_storage().nbytes() == 0
        part.wake()
        assert all(torch.equal(a, b) for a, b in zip(before, (buffer, alone, parameter, shard), strict=True))
    shard.zero_()
    assert (buffer[500:] == 0).all()
    assert not list(tmp_path.iterdir()), "the file has no name: it goes with the process"


@pytest.mark.parametrize("piece_mib", [64, 1])
def test_memory_is_given_back(tmp_path: Path, piece_mib: int) -> None:
    """Pieces below malloc's mmap threshold too: it has grown by then to what the large ones freed."""
    part_of([torch.ones(32 * MIB // 4)], tmp_path).sleep()
    tensors = [torch.ones(piece_mib * MIB // 4) for _ in range(128 // piece_mib)]
    before = resident_mib()
    part = part_of(tensors, tmp_path)
    part.sleep()
    assert before - resident_mib() > 120
    part.wake()
    assert sum(float(t.sum()) for t in tensors) == 128 * MIB / 4


def test_what_is_not_kept_is_only_released() -> None:
    part = part_of([torch.ones(100)], None, "actor.gradients")
    part.sleep()
    assert part.state is State.RELEASED
    part.wake()
    assert part.state is State.RESIDENT and part.resident_bytes() == 400


def test_use_of_what_is_away_is_refused(tmp_path: Path) -> None:
    part = part_of([torch.ones(4)], tmp_path)
    part.require("a forward of the actor")
    part.phase, part.woken_by = lambda: "values", "phases log_probs, m_step"
    part.sleep()
    with pytest.raises(RunError) as refused:
        part.require("a forward of the actor")
    assert str(refused.value) == (
        "in phase values, a forward of the actor needs actor.weights, which is asleep, its contents are in host "
        "memory; it is woken by phases log_probs, m_step"
    )
    with awake(part):
        part.require("a forward of the actor")
    assert part.state is State.ASLEEP


def test_stale_contents_are_refused() -> None:
    part = part_of([torch.ones(4)], None, "rollout.weights")
    part.emptied()
    with pytest.raises(RunError, match=r"rollout\.weights, which is awake, but without its contents"):
        part.require("sampling")
    part.filled()
    part.require("sampling")
    part.sleep()
    for bring in (part.emptied, part.filled):
        with pytest.raises(RunError, match="released, nothing of it was kept"):
            bring()


def test_who_keeps_an_address_is_told_and_a_stale_one_is_caught(tmp_path: Path) -> None:
    tensor = torch.ones(MIB)
    part = part_of([tensor], tmp_path)
    cache = {"address": tensor.data_ptr()}
    part.on_moved(cache.clear)
    check = part.lease("a plan of transfers")
    check()
    part.sleep()
    assert not cache
    with pytest.raises(RunError, match=r"a plan of transfers needs actor\.weights, which is asleep"):
        check()
    part.wake()
    with pytest.raises(RunError, match=r"holds addresses of actor\.weights from before it was moved"):
        check()
    part.lease("a plan of transfers")()


def test_nothing_is_used_while_it_is_being_moved(tmp_path: Path) -> None:
    part = part_of([torch.ones(4)], tmp_path)
    for use in (lambda: part.require("a checkpoint of the actor"), part.sleep, part.wake):
        part.state = State.RESIDENT
        part.on_moved(use)
        with pytest.raises(RunError, match=r"needs actor\.weights, which is being moved"):
            part.sleep()
        part._listeners.clear()


def test_tensors_that_were_replaced_do_not_get_what_was_kept(tmp_path: Path) -> None:
    tensors = [torch.ones(4)]
    part = part_of(tensors, tmp_path, "actor.optimizer")
    part.sleep()
    tensors[0] = torch.zeros(4)
    with pytest.raises(RunError, match="replaced while their storage was away"):
        part.wake()
    with pytest.raises(RunError, match="being moved"):
        part.require("a step of the actor")


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    tensor = torch.arange(MIB, dtype=torch.float32)
    part = part_of([tensor], tmp_path, "critic.optimizer")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with pytest.raises(RunError) as told:
            part.sleep()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(told.value) == f"critic.optimizer cannot be moved off the device: {tmp_path}: File too large"
    assert part.state is State.RESIDENT and torch.equal(tensor, torch.arange(MIB, dtype=torch.float32))
    part.sleep()
    part.wake()
    assert torch.equal(tensor, torch.arange(MIB, dtype=torch.float32))
