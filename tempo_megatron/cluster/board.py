"""What each rank of a node is at, where the launcher that started it can read it after the rank has died."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

#: Descriptor of the board, a file in memory: one line of ``WIDTH`` bytes a rank.
BOARD = "TEMPO_MEGATRON_BOARD"
WIDTH = 64


@contextmanager
def open_board() -> Iterator[int]:
    """A descriptor, which the launcher hands to its ranks."""
    board = os.memfd_create("tempo-board")
    try:
        yield board
    finally:
        os.close(board)


def post(phase: str) -> None:
    """On a rank: its phase from now on. Nothing where no launcher of this program reads it."""
    if BOARD in os.environ:
        line = phase.encode()[:WIDTH].ljust(WIDTH, b"\0")
        os.pwrite(int(os.environ[BOARD]), line, int(os.environ["RANK"]) * WIDTH)


def posted_here(rank: int) -> str:
    """On a rank of the same launcher: another rank's phase, or an empty text."""
    return posted(int(os.environ[BOARD]), rank) if BOARD in os.environ else ""


def posted(board: int, rank: int) -> str:
    """In the launcher: the last phase of a rank, or an empty text."""
    return os.pread(board, WIDTH, rank * WIDTH).rstrip(b"\0").decode(errors="replace")
