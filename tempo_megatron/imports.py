"""Importing large libraries at less cost."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Around imports: Python looks for no garbage within the block, nor ever again in what there was at its end.

    torch, Megatron and vLLM are 6,000 modules of objects that stay.  Walking them again and again while they come, and
    in every full collection after that, takes a fifth of the time of the import.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def absent(*names: str) -> Iterator[None]:
    """Let ``import name`` fail within the block, for libraries that would import it on the chance that it is needed.

    Changes nothing where it is imported already.
    """
    hidden = [name for name in names if name not in sys.modules]
    # None is the import system's own mark: ModuleNotFoundError
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
