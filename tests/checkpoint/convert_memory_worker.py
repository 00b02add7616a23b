"""Run by test_convert_memory.py: conversions; after each a line of JSON with the peak memory so far above that of the
imports, in GiB.

Argument: a JSON list of commands, each ``hf_to_megatron`` or ``megatron_to_hf``, and its arguments.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

from tempo_megatron.checkpoint.convert import command as convert
from tempo_megatron.parallel import cpu_shim

os.environ["CUDA_VISIBLE_DEVICES"] = ""
cpu_shim.install()

import rich.progress  # noqa: E402, F401
from transformers import Olmo3ForCausalLM  # noqa: E402, F401

from tempo_megatron.checkpoint.convert import verify  # noqa: E402, F401


def peak_gib() -> float:
    """Highest resident memory. Not getrusage's ru_maxrss, which begins with what the parent held when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) / 2**20


def main() -> None:
    imports = peak_gib()
    for name, *arguments in json.loads(sys.argv[1]):
        began = time.monotonic()
        if (code := getattr(convert, name)(arguments)) != 0:
            raise SystemExit(code)
        told = {"imports": imports, "above": peak_gib() - imports, "seconds": time.monotonic() - began}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
