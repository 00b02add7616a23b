"""Which GPU is a rank's own."""

from __future__ import annotations

import pytest

from tempo_megatron.cluster.launch import rank_environment
from tempo_megatron.errors import TempoError
from tempo_megatron.parallel import device
from tempo_megatron.parallel.device import _local_gpu


@pytest.mark.parametrize(("local_rank", "visible", "gpu"), [(0, 1, 0), (5, 1, 0), (0, 8, 0), (5, 8, 5), (7, 8, 7)])
def test_a_ranks_gpu(local_rank: int, visible: int, gpu: int) -> None:
    """Where Slurm shows each rank one GPU, that is number 0 whatever the rank."""
    assert _local_gpu(local_rank, visible) == gpu


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(TempoError, match=r"LOCAL_RANK=4: this process sees 4 GPUs; start at most 4 ranks on a node"):
        _local_gpu(4, 4)


def test_the_same_bits_are_asked_of_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rank_environment(1, deterministic=True).items():
        monkeypatch.setenv(name, value)
    assert not device.is_deterministic()
    monkeypatch.setattr(device, "use_cuda", lambda: True)
    assert device.is_deterministic()
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO")
    assert not device.is_deterministic()
