"""Where ranks wait for each other after work of different length.

A collective is given up after ``launch.timeout_s``. That is right where all ranks do the same, and wrong where one
samples, reads or writes for an hour while others are done. So they come together at the job's store first, for as
long as it takes: whether the one they wait for gets on is the watchdog's to judge.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from itertools import count

from torch.distributed import DistStoreError, Store

from tempo_megatron.cluster.pulse import ping

#: Seconds of one request to the store; a wait is many.
SLICE_S = 10.0


class Meeting:
    """All ranks of a job, made by each once they have joined.

    Args:
        store: of the job; a connection of its own is made, for a wait occupies it.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = store.clone()  # type: ignore[attr-defined]  # absent from torch's stubs
        self._store.set_timeout(timedelta(seconds=SLICE_S))
        self._rank, self._world_size = rank, world_size
        self._serials = count()

    def come_together(self) -> None:
        """Return when every rank has called this as often; in the same order among their collectives."""
        serial = next(self._serials)
        came, all_here = _keys(serial)
        if self._store.add(came, 1) == self._world_size:
            self._store.set(all_here, "")
        else:
            self._wait(all_here)
        ping()
        if self._rank == 0 and serial > 0:
            for key in _keys(serial - 1):  # which everybody has left, or would not have come here
                self._store.delete_key(key)

    def _wait(self, key: str) -> None:
        while True:
            with suppress(DistStoreError):  # the slice is over
                self._store.wait([key])
                return


def _keys(serial: int) -> tuple[str, str]:
    return f"meeting/{serial}", f"meeting/{serial}/all"
