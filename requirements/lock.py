"""Write requirements/cpu.lock: everything the CPU stack needs, with exact versions (run by ``make lock``).

pip resolves the direct pins; the packages of excluded.txt, and those that nothing else asks for, are then
left out.  The lock is therefore installed with ``pip install --no-deps -r requirements/cpu.lock``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

FOLDER = Path(__file__).resolve().parent
DIRECT = ("core.txt", "cpu.txt", "dev.txt", "gguf.txt", "wandb.txt")
HEADER = "# Written by `make lock` from the direct pins and excluded.txt; install with pip's --no-deps.\n"


def read_requirements(path: Path) -> list[Requirement]:
    """The requirements of one file, comments and empty lines left out."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def resolve(files: Iterable[Path]) -> list[dict[str, Any]]:
    """pip's resolution of ``files`` on this interpreter, as the ``install`` list of its JSON report."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    wanted = [argument for path in files for argument in ("-r", str(path))]
    report = subprocess.run([*pip, *wanted], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(report)["install"]


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


def main() -> None:
    files = [FOLDER / name for name in DIRECT]
    roots = [requirement for path in files for requirement in read_requirements(path)]
    excluded = {canonicalize_name(requirement.name) for requirement in read_requirements(FOLDER / "excluded.txt")}
    versions = closure(roots, resolve(files), excluded)
    lines = [f"{name}=={version}\n" for name, version in sorted(versions.items())]
    (FOLDER / "cpu.lock").write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"requirements/cpu.lock: {len(lines)} packages")


if __name__ == "__main__":
    main()
