"""One quiet, single-threaded, offline, seeded setting for every test."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# Before any test imports torch, vllm or transformers: they read these once.
os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    TORCHDYNAMO_DISABLE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
)

import hypothesis
import numpy as np
import pytest

from tests.launching import MOST_PATIENCE

# Started under nohup or in a shell's background, the tests would pass ignored signals on to what they start
for _number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# a busy machine is no failure: hypothesis' deadline per example is off, pytest-timeout bounds each test
hypothesis.settings.register_profile("tempo", deadline=None)
hypothesis.settings.load_profile("tempo")


def _why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def _why_no_slurm() -> str | None:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed (make test-slurm installs them)"
    return None if os.geteuid() == 0 else "a cluster on loopback needs root"


def cuda_python() -> Path:
    """Interpreter of the CUDA environment: of the folder CUDA_VENV, else of what ``make cuda-env`` makes."""
    folder = Path(os.environ.get("CUDA_VENV", ".venv-cuda"))
    return Path(__file__).resolve().parent.parent / folder / "bin" / "python"


def _why_no_cuda_env() -> str | None:
    venv = cuda_python().parent.parent
    return None if list(venv.glob(".complete-*")) else f"no CUDA environment in {venv} (make cuda-env; CUDA_VENV)"


def _longest_files_first(items: list[pytest.Item]) -> None:
    """Files are dealt to several processes (make test): none should be left alone with a long one at the end."""
    seconds: Counter[Path] = Counter()
    for item in items:
        if marker := item.get_closest_marker("slow"):
            seconds[item.path] += marker.args[0] if marker.args else 10
    items.sort(key=lambda item: -seconds[item.path])


def _bounds_of_a_busy_machine(items: list[pytest.Item]) -> None:
    """What tests start is bounded by itself (``launching.waited``); pytest-timeout is for what that cannot end."""
    for item in items:
        if marker := item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(MOST_PATIENCE * marker.args[0]), append=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _longest_files_first(items)
    _bounds_of_a_busy_machine(items)
    for marker, why_not in (("gpu", _why_no_gpu), ("slurm", _why_no_slurm), ("cuda_env", _why_no_cuda_env)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = why_not() if marked else None
        if reason is not None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch = sys.modules.get("torch")  # not imported for the tests that do without
    if torch is not None:
        torch.manual_seed(0)
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _no_world_is_left() -> Iterator[None]:
    """A process group of a file's tests ends with them: which files share a process is a matter of chance."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as an HF folder in float32; half a minute, once."""
    from tempo_megatron.demo.real import PACKAGE, write_smollm2

    try:
        metadata.files(PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip(f"package {PACKAGE} is not installed (make demo-real installs it)")
    return write_smollm2(tmp_path_factory.mktemp("smollm2") / "model")
