"""Versions against the pins, and packages that are known to break a run. Reads metadata only, imports none of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tempo_megatron.doctor.finding import Finding, fault, ok, warning

DISTRIBUTION = "tempo-megatron"
#: Packages whose CUDA builds do not load beside the CPU build of torch; transformers' lazy imports fall over them.
OF_TORCH = ("torchvision", "torchaudio", "torchcodec")
SHOWN = 6


def installed(path: Sequence[str] | None = None) -> dict[str, metadata.Distribution]:
    """Distributions by canonical name; the first on the path counts, as it does for an import.

    Args:
        path: folders; None: ``sys.path``.
    """
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions(path=list(sys.path if path is None else path)):
        if name := distribution.metadata["Name"]:
            found.setdefault(canonicalize_name(name), distribution)
    return found


def check_packages(found: dict[str, metadata.Distribution], requires: Iterable[str] | None = None) -> list[Finding]:
    """Args:
    found: ``installed``.
    requires: the pins; None: those of this package's own metadata.
    """
    stack = "cpu" if _version(found, "torch").endswith("+cpu") else "cuda"
    if requires is None:
        own = found.get(DISTRIBUTION)
        requires = (own.requires or []) if own is not None else None
    pins = [_check_unpinned()] if requires is None else _check_pins(found, requires, stack)
    return [*pins, *_check_apex(found), *_check_builds(found, stack)]


def _version(found: dict[str, metadata.Distribution], name: str) -> str:
    return found[name].version if name in found else ""


def _check_unpinned() -> Finding:
    return warning(
        "packages",
        f"{DISTRIBUTION} runs from a folder and is not installed: its pins are not known here",
        "pip install --no-deps -e . in that folder",
    )


def _check_pins(found: dict[str, metadata.Distribution], requires: Iterable[str], stack: str) -> list[Finding]:
    wanted = [Requirement(text) for text in requires]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": stack})]
    core = [r for r in wanted if r.marker is None]
    absent = [r for r in wanted if canonicalize_name(r.name) not in found]
    other = [
        (r, version)
        for r in wanted
        if (version := _version(found, canonicalize_name(r.name))) and not r.specifier.contains(version, True)
    ]
    findings = []
    if absent:
        remedy = "make cuda-env" if stack == "cuda" else f"pip install '{DISTRIBUTION}[{stack}]'"
        findings.append(fault("packages", f"not installed: {_listed(map(str, absent))}", remedy))
    for r, version in other:
        told = f"{r.name} {version}, tested with {r.specifier}"
        remedy = f"pip install '{r.name}{r.specifier}'"
        findings.append((warning if r in core else fault)("packages", told, remedy))
    if not findings:
        main = ", ".join(f"{r.name} {_version(found, canonicalize_name(r.name))}" for r in wanted if r not in core)
        findings.append(ok("packages", f"as pinned for {stack}: {main}, and {len(core)} more"))
    return findings


def _check_apex(found: dict[str, metadata.Distribution]) -> list[Finding]:
    """NVIDIA's is built from source, and has amp and FusedLayerNorm; the package index has an unrelated one."""
    if "apex" not in found:
        return []
    files = {str(file).replace("\\", "/") for file in found["apex"].files or []}
    if any(file.startswith(("apex/amp/", "apex/normalization/", "apex/optimizers/")) for file in files):
        return [ok("apex", f"{_version(found, 'apex')}, NVIDIA's")]
    where = found["apex"].locate_file("")
    return [
        fault(
            "apex",
            f"{_version(found, 'apex')} in {where} is the package index's, which has nothing to do with NVIDIA's",
            "pip uninstall apex; it is not needed, or build NVIDIA's from its repository",
        )
    ]


def _check_builds(found: dict[str, metadata.Distribution], stack: str) -> list[Finding]:
    """Builds of PyPI are for CUDA; those of the CPU index say +cpu."""
    wrong = [name for name in OF_TORCH if stack == "cpu" and name in found and "+cpu" not in _version(found, name)]
    if not wrong:
        return []
    told = ", ".join(f"{name} {_version(found, name)}" for name in wrong)
    return [
        fault(
            "builds for torch",
            f"{told}: built for CUDA, beside torch {_version(found, 'torch')}; transformers' imports fail on it",
            f"pip uninstall {' '.join(wrong)}",
        )
    ]


def _listed(names: Iterable[str]) -> str:
    names = [name.partition(";")[0].strip() for name in names]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
