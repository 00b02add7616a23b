"""The CUDA environment, and what its programs are started with."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import cuda_python
from tests.launching import LaunchResult, launch


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables: of a machine without NVIDIA's driver, where an empty library in its place is."""
    try:
        ctypes.CDLL("libcuda.so.1")
        return {}
    except OSError:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no driver, and no C compiler to make an empty library in its place")
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = [compiler, "-shared", "-x", "c", "/dev/null", f"-Wl,-soname,{library.name}", "-o", str(library)]
    subprocess.run(command, check=True)
    return {"LIBCUDA": str(library)}


@pytest.fixture(scope="session")
def run_there(libcuda: dict[str, str]) -> Callable[..., LaunchResult]:
    """Runs Python's arguments with the CUDA environment's interpreter and without a GPU, by default with a stand-in for
    the driver.
    """

    def run(*arguments: str | Path, timeout_s: float = 300, driver: bool = True) -> LaunchResult:
        # vLLM keeps Triton without a GPU where none is to be seen, and leaves it where it sees none
        env = {"CUDA_VISIBLE_DEVICES": "", **(libcuda if driver else {})}
        return launch([*arguments], nproc=1, timeout_s=timeout_s, env=env, python=cuda_python())

    return run
