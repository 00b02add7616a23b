"""A spawned child that talks JSON over a pipe, has bounded memory and never outlives its parent.

JSON and not pickle: what comes back was made from hostile text.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tempo_megatron.cluster.lifetime import die_with_parent


def send_json(conn: Connection, message: Any) -> None:
    """One message of JSON types.  Raises OSError when the other end is gone."""
    conn.send_bytes(json.dumps(message).encode("ascii"))


def recv_json(conn: Connection) -> Any:
    """The next message.  Raises EOFError or OSError when the other end is gone."""
    return json.loads(conn.recv_bytes())


def spawn_child(
    name: str, target: Callable[..., None], *args: Any, memory_limit_mib: int | None = None
) -> tuple[BaseProcess, Connection]:
    """Starts ``target(conn, *args)`` in a fresh interpreter; returns the process and our end of its pipe.

    Args:
        name: of the process, for ``ps`` and errors.
        target: a module-level function of a module that is cheap to import.
        args: small picklable values.
        memory_limit_mib: the child's address space (RLIMIT_AS), MiB; none: unlimited.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_child, name=name, args=(target, theirs, os.getpid(), memory_limit_mib, args), daemon=True
    )
    process.start()
    theirs.close()  # so that reading ours ends when the child does
    return process, ours


def _child(
    target: Callable[..., None], conn: Connection, parent: int, memory_limit_mib: int | None, args: tuple[Any, ...]
) -> None:
    die_with_parent(parent)  # a killed one can't clean up, and a busy child doesn't notice the closed pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if memory_limit_mib is not None:
        limit = memory_limit_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    target(conn, *args)
