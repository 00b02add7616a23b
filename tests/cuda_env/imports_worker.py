"""Run by test_cuda_env.py with the CUDA environment's interpreter: what cannot be imported there.

Prints a JSON object: "failed": module -> error; "imported": how many there were; "versions": of the main libraries.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from importlib import metadata

import torch

import tempo_megatron
from tempo_megatron.parallel import cpu_shim

#: Parts of libraries that our modules import inside their functions, or that only GPUs come to.
LIBRARIES = (
    "transformer_engine.pytorch",
    "transformer_engine.pytorch.optimizers",
    "transformer_engine.common.recipe",
    "transformer_engine_torch",
    "megatron.core.extensions.transformer_engine",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.moe_module_specs",
    "megatron.core.dist_checkpointing",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu.sample.sampler",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.device_allocator.cumem",
    "vllm.device_allocator.sleep_mode_backend",
    "vllm.model_executor.models.qwen2",
    "vllm.model_executor.models.qwen3",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.transformers",
    "vllm.model_executor.model_loader.reload.layerwise",
    "vllm.model_executor.layers.quantization.fp8",
)
VERSIONS = ("torch", "megatron-core", "transformer-engine-torch", "transformers", "vllm")


def main() -> None:
    from tests.cuda_env import hopper

    hopper.without_driver()
    cpu_shim.install()
    hopper.pretend()
    ours = [module.name for module in pkgutil.walk_packages(tempo_megatron.__path__, "tempo_megatron.")]
    names = [name for name in (*LIBRARIES, *ours) if not name.endswith("__main__")]
    failed = {}
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    versions = {name: metadata.version(name) for name in VERSIONS} | {"cuda": torch.version.cuda}
    print(json.dumps({"failed": failed, "imported": len(names), "versions": versions}))


if __name__ == "__main__":
    main()
