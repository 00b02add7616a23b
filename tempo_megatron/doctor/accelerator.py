"""What torch, its GPUs and Transformer Engine can do here. Imports torch when it is called."""

from __future__ import annotations

import importlib.util
import subprocess
from importlib import metadata
from typing import Any

from tempo_megatron.doctor.finding import GIB, Finding, fault, ok, size, warning

#: The oldest driver that CUDA 13 runs on (CUDA's release notes, table 3: >= 580).
DRIVER = 580
#: Compute capabilities: bfloat16 from Ampere on, FP8 from Ada and Hopper on.
BFLOAT16, FP8 = (8, 0), (8, 9)


def check_accelerator(dtypes: set[str] | None = None) -> list[Finding]:
    """Args:
    dtypes: that a config asks for.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        return [
            fault("torch", f"cannot be imported: {error}", "install the pins of one stack: pip install -e '.[cuda]'")
        ]
    dtypes = dtypes or set()
    if torch.version.cuda is None:
        return [ok("torch", f"{torch.__version__}: the CPU build; models run on the CPU, over gloo")]
    if not torch.cuda.is_available():
        return [_check_why_no_gpu(torch), *_check_driver(), _check_transformer_engine(has_gpu=False)]
    findings = [
        ok(
            "torch",
            f"{torch.__version__}, CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}",
        ),
        *_check_driver(),
        *(_check_gpu(torch, index, dtypes) for index in range(torch.cuda.device_count())),
        *_check_alike(torch),
        _check_transformer_engine(has_gpu=True),
    ]
    return findings


def _check_why_no_gpu(torch: Any) -> Finding:
    told = f"{torch.__version__} is built for CUDA {torch.version.cuda} and sees no GPU"
    return fault(
        "torch", told, "nvidia-smi; CUDA_VISIBLE_DEVICES; in a job --gpus-per-node; in a container --nv, --gpus"
    )


def _check_driver() -> list[Finding]:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        remedy = f"CUDA 13 needs a driver of {DRIVER} or later; in a container it is the host's"
        return [warning("driver", "none is known: nvidia-smi does not answer", remedy)]
    if not lines or int(lines[0].split(".")[0]) >= DRIVER:
        return [ok("driver", lines[0])] if lines else []
    return [
        fault("driver", f"{lines[0]}; CUDA 13 needs {DRIVER} or later", "a newer driver, or torch for an older CUDA")
    ]


def _check_gpu(torch: Any, index: int, dtypes: set[str]) -> Finding:
    properties, check = torch.cuda.get_device_properties(index), f"GPU {index}"
    free, total = torch.cuda.mem_get_info(index)
    capability = (properties.major, properties.minor)
    which = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    told = f"{which}, {size(free)} of {size(total)} free"
    if "bfloat16" in dtypes and capability < BFLOAT16:
        return fault(check, f"{told}: no bfloat16", "dtype: float32, or a newer GPU")
    if total - free > 2 * GIB:
        return warning(check, told, "another process is on it: nvidia-smi")
    return ok(check, f"{told}, {'FP8' if capability >= FP8 else 'no FP8'}")


def _check_alike(torch: Any) -> list[Finding]:
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    if len(names) < 2:
        return []
    return [warning("GPUs", f"are not alike: {', '.join(sorted(names))}", "the slowest and the smallest count for all")]


def _check_transformer_engine(*, has_gpu: bool) -> Finding:
    if importlib.util.find_spec("transformer_engine") is None:
        return warning("transformer engine", "is not installed", "layer_spec: torch is slower; make cuda-env")
    try:
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
    except (ImportError, OSError) as error:  # FileNotFoundError where its PyTorch part was not built
        told = f"cannot be imported, nor can Megatron-Core beside it: {error}"
        return fault("transformer engine", told, "make cuda-env builds it against this torch (README, Install)")
    version = metadata.version("transformer-engine")
    if not has_gpu:
        return ok("transformer engine", version)
    able, why = FP8GlobalStateManager.is_fp8_available()
    return ok("transformer engine", f"{version}, FP8: {'yes' if able else why}")
