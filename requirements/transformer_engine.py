"""Build Transformer Engine's PyTorch part against the torch of this environment, and install it (``make cuda-env``).

It is C++ alone, which needs no GPU, but the headers of CUDA and the version of its nvcc: both lie in the nvidia-*
wheels that torch and the lock bring, or in a toolkit.  A wheel that was built before, against this torch, is taken; a
build that was interrupted goes on where it was.

    transformer_engine.py LOCK FOLDER [JOBS]

FOLDER keeps sources, objects and wheel; JOBS files are compiled at a time, each takes about 2 GiB.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = "transformer-engine-torch"
#: Headers that the sources include, each with what brings it.
HEADERS = {
    "cuda_runtime.h": "nvidia-cuda-runtime",
    "cublasLt.h": "nvidia-cublas",
    "cudnn.h": "nvidia-cudnn-cu13",
    "nccl.h": "nvidia-nccl-cu13",
    "nvrtc.h": "nvidia-cuda-nvrtc",
    "crt/host_config.h": "nvidia-cuda-crt",
}


def pinned(lock: Path, package: str) -> str:
    """The version of a package in a lock; SystemExit if it is not there."""
    for line in lock.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") and (requirement := Requirement(line)).name == package:
            return str(requirement.specifier).removeprefix("==")
    sys.exit(f"error: {lock} pins no {package}; make lock-cuda writes it")


def wheel_folders() -> list[Path]:
    """Headers of the nvidia-* wheels of this environment."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    return sorted(folder for root in roots for folder in Path(root).glob("*/include"))


def toolkit_folders() -> list[Path]:
    """Headers of a CUDA toolkit: CUDA_HOME's, else the usual place's."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    return [folder] if folder.is_dir() else []


def nvcc_home() -> Path:
    """What has nvcc, which the sources ask for its version and nothing else; SystemExit where nothing has."""
    homes = [*filter(None, [os.environ.get("CUDA_HOME")]), *(f.parent for f in wheel_folders()), "/usr/local/cuda"]
    for home in map(Path, homes):
        if (home / "bin" / "nvcc").is_file():
            return home
    sys.exit("error: no nvcc, whose version Transformer Engine's sources ask for: install nvidia-cuda-nvcc")


def missing_headers(folders: Iterable[Path]) -> list[str]:
    folders = list(folders)
    return [f"{name} ({wheel})" for name, wheel in HEADERS.items() if not any((f / name).is_file() for f in folders)]


def require_tools(folders: list[Path]) -> None:
    """SystemExit, with what to do, where something is missing without which the build would end in many lines."""
    if absent := missing_headers(folders):
        sys.exit(
            f"error: headers of CUDA are missing: {', '.join(absent)}. Install the packages named, or set CUDA_HOME to "
            f"a CUDA 13 toolkit. Looked in: {', '.join(map(str, folders)) or 'no folder'}"
        )
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        sys.exit(f"error: no C++ compiler: {compiler} is not on the path; install g++ or set CXX")
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        sys.exit(f"error: no Python.h in {include}: install Python's headers (python3-dev, or python3.12-dev)")


def torch_version() -> str:
    """The version of this environment's torch, such as 2.13.0+cu130; SystemExit where that is no build for CUDA 13."""
    try:
        import torch
    except (ImportError, OSError) as error:
        sys.exit(f"error: torch cannot be imported: {error}")
    if (torch.version.cuda or "").partition(".")[0] != "13":
        sys.exit(
            f"error: torch {torch.__version__} is not the build for CUDA 13: look at pip's find-links and extra "
            "indexes (pip config list), which have another build of this version"
        )
    return str(torch.__version__)


def unpacked(version: str, folder: Path) -> Path:
    """The sources, fetched once."""
    name = f"{PACKAGE.replace('-', '_')}-{version}"
    sources = folder / name
    if not (sources / ".whole").exists():
        download = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        pip(*download, "--dest", str(folder), f"{PACKAGE}=={version}")
        shutil.rmtree(sources, ignore_errors=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        (sources / ".whole").touch()
    return sources


def build(sources: Path, folder: Path, headers: list[Path], jobs: int) -> Path:
    """The wheel.  pip builds in the folder of the sources, so that ninja finds what it has compiled before."""
    os.environ["CPATH"] = os.pathsep.join(map(str, headers))
    os.environ["MAX_JOBS"] = str(jobs)
    os.environ["NVTE_PYTORCH_FORCE_BUILD"] = "TRUE"  # it would first look for a wheel elsewhere
    os.environ["NVTE_NO_LOCAL_VERSION"] = "1"  # it would take the commit of this repository for its own
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
    fresh = folder / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    pip("wheel", "-v", "--no-cache-dir", "--no-build-isolation", "--no-deps", "--wheel-dir", str(fresh), str(sources))
    (wheel,) = fresh.glob("*.whl")
    shutil.rmtree(sources)  # the build has removed parts of it
    return wheel.rename(folder / wheel.name)


def pip(*arguments: str) -> None:
    """SystemExit where pip fails, whose own message is above."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode:
        sys.exit(f"error: pip {arguments[0]} failed for {PACKAGE} (its own message is above)")


def main() -> None:
    lock, jobs = Path(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else os.cpu_count() or 1
    version, torch = pinned(lock, PACKAGE), torch_version()
    python = "cp{}{}".format(*sys.version_info)
    folder = Path(sys.argv[2]).resolve() / f"{version}-torch-{torch}-{python}"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        headers = [*wheel_folders(), *toolkit_folders()]
        require_tools(headers)
        os.environ["CUDA_HOME"] = str(nvcc_home())
        print(f"building {PACKAGE} {version} against torch {torch}: 20 minutes of one core, {jobs} at a time")
        wheel = build(unpacked(version, folder), folder, headers, jobs)
    pip("install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", str(wheel))


if __name__ == "__main__":
    main()
