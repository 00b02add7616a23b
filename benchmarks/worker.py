"""One process of a contender: ``python -m benchmarks.worker PARENT MODULE:FUNCTION SETTINGS``; see ``harness``.

JSON lines on stdin and stdout; whatever libraries print goes to stderr.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any

from benchmarks.harness import Prepare, Run
from tempo_megatron.cluster.lifetime import die_with_parent


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    die_with_parent(int(sys.argv[1]))
    try:
        module, function = sys.argv[2].split(":")
        prepare: Prepare = getattr(importlib.import_module(module), function)(json.loads(sys.argv[3]))
        _say(answers, {"ready": True})
        while line := sys.stdin.readline():
            run = prepare(json.loads(line))
            _say(answers, {"prepared": True})
            sys.stdin.readline()
            _say(answers, _measured(run))
    except Exception as error:
        traceback.print_exc()
        _say(answers, {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"})


def _say(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")


def _measured(run: Run) -> dict[str, Any]:
    gc.collect()
    before = _start_peak()
    cpu, start = _cpu_s(), time.perf_counter()
    facts = run()
    seconds, cpu = time.perf_counter() - start, _cpu_s() - cpu
    extra = None if before is None else _status("VmHWM") - before
    own: dict[str, Any] = {key: facts.pop(key) for key in ("seconds", "cpu_s") if key in facts}
    return {"seconds": seconds, "cpu_s": cpu, "extra_bytes": extra, "facts": facts, **own}


def _cpu_s() -> float:
    """User and system time of all threads, and of children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _start_peak() -> int | None:
    """Set the kernel's high-water mark back (proc(5)); the resident set in bytes, None where that is not permitted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
