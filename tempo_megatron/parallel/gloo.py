"""One network device of gloo for all process groups of a rank.

torch gives each group a device of its own, whose thread wakes a hundred times a second (gloo's transport/tcp/loop.cc).
A run makes a hundred groups: an eighth of a core for each rank that does nothing, and threads that keep ranks from
running where there are fewer cores than ranks.
"""

from __future__ import annotations

import datetime
import os

import torch.distributed as dist
from torch.distributed import distributed_c10d

from tempo_megatron.patching import replace_value


class _SharedDevices:
    """In the place of ``ProcessGroupGloo`` where torch makes groups, and asks whether one is of that class."""

    def __init__(self) -> None:
        self._devices: list[dist.ProcessGroupGloo.Device] = []

    def __call__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> dist.ProcessGroupGloo:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = self._devices or self._make_devices()
        options._threads = 2 * len(options._devices)
        options._timeout = timeout
        return dist.ProcessGroupGloo(store, rank, size, options)

    def _make_devices(self) -> list[dist.ProcessGroupGloo.Device]:
        """As torch's csrc/distributed/c10d/init.cpp makes them for a group."""
        interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        make, default = dist.ProcessGroupGloo.create_device, dist.ProcessGroupGloo.create_default_device
        self._devices = [make(interface=name) for name in interfaces] or [default()]
        return self._devices

    def __instancecheck__(self, group: object) -> bool:
        return isinstance(group, dist.ProcessGroupGloo)


_SHARED = _SharedDevices()


def share_devices() -> None:
    """Have every group of gloo that is made from here on share its devices; calling it again changes nothing."""
    replace_value(distributed_c10d, "ProcessGroupGloo", _SHARED, (type, _SharedDevices))
