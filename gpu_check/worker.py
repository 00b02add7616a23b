"""The process of one item: ``python -m gpu_check.worker PARENT MODULE:FUNCTION FOLDER FILE``; see ``runner``."""

from __future__ import annotations

import faulthandler
import importlib
import signal
import sys
import traceback
from pathlib import Path

from benchmarks.process_tree import adopt_orphans
from gpu_check.check import Check, SkippedError
from tempo_megatron.cluster.lifetime import die_with_parent

#: Upon which an item's process writes its stacks and goes on.
WHERE = signal.SIGUSR1


def main() -> None:
    faulthandler.register(WHERE)
    die_with_parent(int(sys.argv[1]))
    adopt_orphans()
    module, function = sys.argv[2].split(":")
    with Path(sys.argv[4]).open("a") as told:
        check = Check(Path(sys.argv[3]), told)
        try:
            getattr(importlib.import_module(module), function)(check)
        except SkippedError as skipped:
            check.end("skipped", str(skipped))
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines()
            check.end("failed", f"{type(error).__name__}: {' '.join(lines)[:500]}")
        else:
            check.end("ok")


if __name__ == "__main__":
    main()
