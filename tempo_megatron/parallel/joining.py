"""The ranks of a job find each other: the store of rank 0, and a word for each way in which that fails."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from tempo_megatron.cluster.lifetime import EXIT_LOST_PEER, is_spawned, leave
from tempo_megatron.cluster.local import STORE_SOCKET
from tempo_megatron.errors import RunError, TempoError

#: Seconds after the time limit at which joining is given up even if the store itself never returns.
JOIN_SLACK_S = 30.0
#: Seconds for which a host name that does not resolve is asked for again: many nodes ask at the same time.
RESOLVE_S = 10.0
#: Ranks that a line names.
SHOWN = 8


def join_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store where the ranks of this job meet, once all of them have come.

    Raises:
        TempoError: another program has the port, or the host name means nothing here.
        RunError: rank 0 does not answer, or some ranks did not come.
    """
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    limit = f"launch.timeout_s: {timeout.total_seconds():g}"
    with _ended_after(timeout.total_seconds() + JOIN_SLACK_S, f"error: no answer from {place}, where the ranks meet"):
        _require_place()
        try:
            store = _connect(rank, world_size, timeout)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" in str(error):
                raise TempoError(
                    f"environment: MASTER_PORT={os.environ.get('MASTER_PORT')}: another program listens there on this "
                    "machine; set another one"
                ) from error
            raise RunError(
                f"launch: no answer from rank 0 at {place}, where the ranks meet, to rank {rank} (host "
                f"{socket.gethostname()}) ({limit})"
            ) from error
        _await_all(store, rank, world_size, timeout, f"to {place} ({limit})")
    return store


@contextmanager
def connected(rank: int, timeout: timedelta) -> Iterator[None]:
    """Around the making of the first process group, in which every rank connects to every other.

    Raises:
        RunError: a rank is not to be reached from this one.
    """
    limit = f"launch.timeout_s: {timeout.total_seconds():g}"
    what = f"launch: rank {rank} (host {socket.gethostname()}) cannot connect to all other ranks"
    with _ended_after(timeout.total_seconds() + JOIN_SLACK_S, f"error: {what} ({limit})"):
        try:
            yield
        except dist.DistStoreError as error:
            raise RunError(f"{what}: some did not tell their address ({limit})") from error
        except RuntimeError as error:
            if "connectFullMesh" not in str(error):
                raise
            raise RunError(f"{what} ({limit}); GLOO_SOCKET_IFNAME says by which network interface") from error


def _require_place() -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise TempoError(f"environment: {name} is not set, but RANK is; it says where the ranks meet")
    port = os.environ["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise TempoError(f"environment: MASTER_PORT={port} must be a port, 1 to 65535")
    _require_resolvable(os.environ["MASTER_ADDR"])


def _require_resolvable(host: str) -> None:
    deadline = time.monotonic() + RESOLVE_S
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TempoError(
                    f"environment: MASTER_ADDR={host}: host {socket.gethostname()} finds no address of that name "
                    f"({error.strerror}); set it to a name or address of rank 0's node that all nodes know"
                ) from None
        time.sleep(0.5)


def _connect(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """As torch's rendezvous.py, ``_create_c10d_store``, does it."""
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent serves it
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not of_agent,
        timeout=timeout,
        wait_for_workers=False,  # which could not say who is missing
        multi_tenant=not is_spawned(),
        master_listen_fd=int(os.environ[STORE_SOCKET]) if is_spawned() and rank == 0 else None,
    )


def _await_all(store: dist.Store, rank: int, world_size: int, timeout: timedelta, where: str) -> None:
    keys = [f"joined/{r}" for r in range(world_size)]
    try:
        store.set(keys[rank], socket.gethostname())
        store.wait(keys, timeout)
    except dist.DistStoreError:
        absent = [r for r, key in enumerate(keys) if not store.check([key])]
        hosts = {store.get(key).decode() for r, key in enumerate(keys) if r not in absent}
        who = ", ".join(map(str, absent[:SHOWN])) + (f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else "")
        raise RunError(
            f"launch: {'rank' if len(absent) == 1 else 'ranks'} {who} of {world_size} did not come {where}; the others "
            f"did, on {_listed(sorted(hosts))}"
        ) from None
    except dist.DistNetworkError as error:
        raise RunError(f"launch: rank 0 ended before all of {world_size} ranks came {where}") from error


def _listed(hosts: list[str]) -> str:
    shown = ", ".join(hosts[:SHOWN]) + (f" and {len(hosts) - SHOWN} more" if len(hosts) > SHOWN else "")
    return f"{'host' if len(hosts) == 1 else 'hosts'} {shown}"


@contextmanager
def _ended_after(seconds: float, text: str) -> Iterator[None]:
    """A request to a store whose host is stopped never returns, whatever its own time limit."""
    timer = threading.Timer(seconds, leave, [text, EXIT_LOST_PEER])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
