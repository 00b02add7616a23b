"""Runs ``cli.main`` on each case of a JSON file, one after the other: ``refused_worker PLAN.json RESULTS.json``.

A result is what file descriptors 1 and 2 got, and the run's files before and after.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tempo_megatron import cli


def files(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def run(case: dict[str, Any]) -> dict[str, Any]:
    if case["copy"]:
        shutil.copytree(*case["copy"])
    for path, text in case["write"].items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    before = files(Path(case["output"]))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    kept, captured = (os.dup(1), os.dup(2)), os.open("captured", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for place in (1, 2):
        os.dup2(captured, place)
    resource.setrlimit(resource.RLIMIT_FSIZE, (case["largest_file"] or hard, hard))
    began = time.monotonic()
    code = cli.main(["train", *case["arguments"]])
    seconds = time.monotonic() - began
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    for place, number in enumerate(kept, start=1):
        os.dup2(number, place)
    return {
        "code": code,
        "output": Path("captured").read_text(),
        "seconds": seconds,
        "before": before,
        "after": files(Path(case["output"])),
        "torch": "torch" in sys.modules,
    }


if __name__ == "__main__":  # the processes that read data import this file, too
    plan = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps({name: run(case) for name, case in plan.items()}))
