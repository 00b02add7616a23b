"""Items that end in each way, for test_runner.py."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time

from gpu_check.check import Check, SkippedError


def quick(check: Check) -> None:
    check.figure("speed", 2.0, "x", ">= 1")
    check.note("quick has run")


def missing(check: Check) -> None:
    check.figure("speed", 0.5, "x", ">= 1")


def skipped(check: Check) -> None:
    raise SkippedError("nothing to see here")


def raising(check: Check) -> None:
    raise ValueError("the second number\nis wrong")


def crashing(check: Check) -> None:
    check.figure("before the crash", 1.0)
    ctypes.string_at(0)


def leaving(check: Check) -> None:
    sys.exit(7)


def hanging(check: Check) -> None:
    """With a child in a session of its own, whose number it tells."""
    check.figure("before the hang", 1.0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    check.note(f"child {child.pid}")
    time.sleep(600)
