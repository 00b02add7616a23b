"""A rank that a test can hold in a phase: ``python -m tests.slurm.held -m tempo_megatron train ...``.

In folder ``HOLD_FOLDER`` the file ``at`` names a phase. A rank that enters it writes ``rank_N`` and waits there for as
long as ``at`` names it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

PATCHED = "tempo_megatron.telemetry.phases"


def wait_here(phase: str) -> None:
    folder = Path(os.environ["HOLD_FOLDER"])
    while _held_at(folder) == phase:
        (folder / f"rank_{os.environ['SLURM_PROCID']}").write_text(phase)
        time.sleep(0.05)


def _held_at(folder: Path) -> str | None:
    try:
        return (folder / "at").read_text()
    except FileNotFoundError:
        return None


class _Finder(importlib.abc.MetaPathFinder):
    """Patches the module when it is imported: before, a rank has imported nothing heavy."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != PATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            _patch(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _patch(module: ModuleType) -> None:
    phase = module.PhaseLedger.phase

    @contextmanager
    def held_phase(self: Any, name: str, detail: str = "") -> Iterator[None]:
        with phase(self, name, detail):
            wait_here(name)
            yield

    module.PhaseLedger.phase = held_phase


def main() -> None:
    assert sys.argv[1:3] == ["-m", "tempo_megatron"]
    sys.meta_path.insert(0, _Finder())
    sys.argv = sys.argv[2:]
    runpy.run_module("tempo_megatron", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
