"""Write the lock of a stack: everything it needs, with exact versions (run by ``make lock`` and ``make lock-cuda``).

pip resolves the direct pins; packages that the stack leaves out, and those that nothing else asks for, are then left
out.  A lock is therefore installed with ``pip install --no-deps -r``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

FOLDER = Path(__file__).resolve().parent
HEADER = "# Written by `make {target}` from the direct pins{sieve}; install with pip's --no-deps.\n"


class Stack(NamedTuple):
    """What is locked together.

    Attributes:
        pins: files of direct pins.
        target: of the Makefile, which writes the lock.
        pythons: each has a lock of its own where there are several.
        excluded: file of packages that are left out; None: all stay.
    """

    pins: tuple[str, ...]
    target: str
    pythons: tuple[str, ...]
    excluded: str | None = None

    def direct(self) -> list[Requirement]:
        return [requirement for name in self.pins for requirement in read_requirements(FOLDER / name)]

    def left_out(self) -> set[NormalizedName]:
        if self.excluded is None:
            return set()
        return {canonicalize_name(requirement.name) for requirement in read_requirements(FOLDER / self.excluded)}


COMMON = ("core.txt", "dev.txt", "gguf.txt", "wandb.txt")
STACKS = {
    "cpu": Stack((*COMMON, "cpu.txt"), "lock", ("3.11",), "excluded.txt"),
    "cuda": Stack((*COMMON, "cuda.txt", "cuda-build.txt"), "lock-cuda", ("3.11", "3.12")),
}


def lock_file(name: str, python: str) -> Path:
    """The lock of stack ``name`` for a Python such as "3.12"."""
    return FOLDER / (f"{name}-{python}.lock" if len(STACKS[name].pythons) > 1 else f"{name}.lock")


def read_requirements(path: Path) -> list[Requirement]:
    """The requirements of one file, comments and empty lines left out."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def resolve(files: Iterable[Path]) -> list[dict[str, Any]]:
    """pip's resolution of ``files`` on this interpreter, as the ``install`` list of its JSON report.

    Without build isolation: what is published as source only may have to look at this environment's torch to say what
    it needs.
    """
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    wanted = [argument for path in files for argument in ("-r", str(path))]
    found = subprocess.run([*pip, "--no-build-isolation", *wanted], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout)["install"]


def closure(roots: Iterable[Requirement], packages: list[dict[str, Any]], excluded: Collection[str]) -> dict[str, str]:
    """Name -> version of all that ``roots`` need, never passing through an excluded package."""
    metadata = {canonicalize_name(package["metadata"]["name"]): package["metadata"] for package in packages}
    visited: set[tuple[NormalizedName, str]] = set()
    waiting = [(canonicalize_name(root.name), extra) for root in roots for extra in ("", *root.extras)]
    while waiting:
        name, extra = waiting.pop()
        if name in excluded or (name, extra) in visited:
            continue
        visited.add((name, extra))
        for requirement in map(Requirement, metadata[name].get("requires_dist", [])):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = canonicalize_name(requirement.name)
                waiting += [(needed, wanted) for wanted in ("", *requirement.extras)]
    return {name: metadata[name]["version"] for name, _ in visited}


def other_builds(roots: Iterable[Requirement], versions: dict[str, str]) -> list[str]:
    """Pins for which pip took another build of the version, such as 2.13.0+cpu for 2.13.0."""
    exact = {canonicalize_name(root.name): str(root.specifier).removeprefix("==") for root in roots}
    return [
        f"{name} {versions[name]} for {name}=={version}"
        for name, version in exact.items()
        if versions[name].startswith(f"{version}+")
    ]


def main() -> None:
    name, python = sys.argv[1], "{}.{}".format(*sys.version_info)
    stack = STACKS[name]
    if python not in stack.pythons:
        sys.exit(f"error: the {name} stack is locked for Python {' and '.join(stack.pythons)}; this is {python}")
    roots = stack.direct()
    versions = closure(roots, resolve(FOLDER / pins for pins in stack.pins), stack.left_out())
    if others := other_builds(roots, versions):
        sys.exit(f"error: pip took {', '.join(others)}: look at its find-links and extra indexes (pip config list)")
    lines = [f"{package}=={version}\n" for package, version in sorted(versions.items())]
    path = lock_file(name, python)
    header = HEADER.format(target=stack.target, sieve=f" and {stack.excluded}" if stack.excluded else "")
    path.write_text(header + "".join(lines), encoding="utf-8")
    print(f"requirements/{path.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
