from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).resolve().parent.parent / "requirements"


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("requirements_lock", FOLDER / "lock.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def locked(lock: ModuleType) -> dict[str, str]:
    """Name -> version of requirements/cpu.lock."""
    pins = lock.read_requirements(FOLDER / "cpu.lock")
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}


def test_every_direct_pin_is_exact_and_in_the_lock(lock: ModuleType, locked: dict[str, str]) -> None:
    direct = [pin for name in lock.DIRECT for pin in lock.read_requirements(FOLDER / name)]
    assert {canonicalize_name(pin.name): str(pin.specifier) for pin in direct} == {
        canonicalize_name(pin.name): f"=={locked.get(canonicalize_name(pin.name))}" for pin in direct
    }


def test_lock_is_sorted_and_holds_nothing_excluded_and_no_cuda(lock: ModuleType, locked: dict[str, str]) -> None:
    excluded = {pin.name for pin in lock.read_requirements(FOLDER / "excluded.txt")}
    assert list(locked) == sorted(locked)
    assert {"torchvision", "torchaudio", "torchcodec", "triton"} <= excluded
    assert not excluded & set(locked)
    assert not [name for name in locked if name.startswith(("nvidia", "cuda", "cupy"))]
    assert locked["torch"].endswith("+cpu")


def test_closure_follows_extras_and_markers_but_not_excluded_packages(lock: ModuleType) -> None:
    def package(name: str, *requires: str) -> dict[str, object]:
        return {"metadata": {"name": name, "version": "1", "requires_dist": list(requires)}}

    packages = [
        package("Top_Level", "a[fast]", "server", 'never; sys_platform == "win32"'),
        package("a", 'b; extra == "fast"', 'c; extra == "slow"'),
        package("b"),
        package("c"),
        package("server", "only-for-server"),
        package("only-for-server"),
    ]
    found = lock.closure([Requirement("top-level")], packages, {"server"})
    assert found == {"top-level": "1", "a": "1", "b": "1"}
