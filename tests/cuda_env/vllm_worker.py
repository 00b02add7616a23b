"""Run by test_cuda_env.py with the CUDA environment's interpreter: what vLLM makes of our settings on an H100.

Argument: a folder for models.  Prints a JSON object: family -> what vLLM decided, and the bytes that each rank of a
replica of two takes; "classes": what is left of transformers' class after a model of OLMo-3 was made for compilation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.cuda_env import hopper

hopper.without_driver()

from tempo_megatron.parallel import cpu_shim  # noqa: E402

cpu_shim.install()

import torch  # noqa: E402

from tempo_megatron.config.rollout import RolloutConfig  # noqa: E402
from tempo_megatron.config.schema import ParallelConfig  # noqa: E402
from tempo_megatron.model.held import megatron_holdings  # noqa: E402
from tempo_megatron.model.hf_tensors import expected_tensors  # noqa: E402
from tempo_megatron.reshard.fp8 import quantised_tensors  # noqa: E402
from tempo_megatron.reshard.plan import Plan  # noqa: E402
from tempo_megatron.rollout import patches  # noqa: E402
from tempo_megatron.rollout.engine import GenerationRequest, RolloutEngine, engine_arguments  # noqa: E402
from tempo_megatron.rollout.landings import _in_place_of, foreseen_destinations, foreseen_ranks  # noqa: E402
from tests.model.parity_cases import FAMILIES, config_of  # noqa: E402

#: Of vLLM's kernels on a GPU.
SIZES = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "vocab_size": 512}
EXPERT_WIDTH = 128


def engine_config(hf_dir: str, rollout: RolloutConfig, world_size: int) -> Any:
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    arguments = engine_arguments(hf_dir, rollout, 64, 1, world_size, 80 * hopper.GIB, sleeps=True)
    return EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)


def decided(config: Any) -> dict[str, Any]:
    """What our own code relies on, or has to know."""
    return {
        "v2": config.use_v2_model_runner,
        "async": config.scheduler_config.async_scheduling,
        "mode": config.compilation_config.mode.name,
        "sleep": config.model_config.enable_sleep_mode,
        "logprobs": config.model_config.logprobs_mode,
        "chunked": config.scheduler_config.enable_chunked_prefill,
        "kv_bytes": config.cache_config.kv_cache_memory_bytes,
        "architecture": config.model_config._model_info.architecture,
    }


def planned_bytes(hf_dir: str, hf_config: Any) -> list[int]:
    """Of an update from two tensor-parallel ranks to two, as vLLM's loaders for a GPU take the tensors."""
    tensors = expected_tensors(hf_config, "actor")
    destinations = foreseen_destinations(hf_dir, tensors, 2, expert_parallel=False, dtype="bfloat16")
    holdings = megatron_holdings(hf_config, "actor", ParallelConfig(tensor_model_parallel_size=2), 2)
    plan = Plan(holdings, list(destinations), 64 << 20, 2)
    return [sum(target.nbytes for target in plan.destination_of(rank).targets) for rank in range(2)]


def in_fp8(folder: Path, hf_config: Any) -> list[float]:
    """Bytes of a replica's weights in FP8 by blocks of bfloat16's, and whether all linear layers' tensors come so."""
    tensors = expected_tensors(hf_config, "actor")
    settings = [RolloutConfig(dtype="bfloat16", weights=weights) for weights in ("fp8", "trained")]
    fp8, plain = (next(iter(foreseen_ranks(folder, tensors, config, None))) for config in settings)
    wanted = {name for name in tensors if name.endswith("_proj.weight")}
    return [fp8.weights / plain.weights, quantised_tensors([fp8.destination]) == wanted]


def classes_after_compilation(config: Any) -> dict[str, Any]:
    from transformers import AutoModel, Olmo3Model
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    before = Olmo3Model.__bases__, Olmo3Model.__init__, Olmo3Model.__call__
    with (
        patches.hf_classes_compiled_apart(),
        _in_place_of(0, 1),
        set_current_vllm_config(config),
        set_default_torch_dtype(torch.bfloat16),
        torch.device("meta"),
    ):
        inner = initialize_model(config).model
    with torch.device("meta"):
        plain = AutoModel.from_config(config.model_config.hf_config, attn_implementation="eager")
    return {
        "compiled": isinstance(inner, TorchCompileWithNoGuardsWrapper) and not inner.do_not_compile,
        "is_theirs": isinstance(inner, Olmo3Model),
        "left_alone": (Olmo3Model.__bases__, Olmo3Model.__init__, Olmo3Model.__call__) == before,
        "others_make": type(plain) is Olmo3Model,
    }


def sampling_parameters() -> dict[str, Any]:
    asked = SimpleNamespace(_config=RolloutConfig(), _stop_token_ids=[1])
    made = RolloutEngine._sampling_params(
        asked, GenerationRequest([5], seed=(1 << 62) - 1, num_samples=4, max_tokens=8)
    )  # type: ignore[arg-type]
    return {"n": made.n, "seed": made.seed, "logprobs": made.logprobs, "flat": made.flat_logprobs}


def main() -> None:
    patches.prepare_process()
    hopper.pretend()
    found: dict[str, Any] = {"sampling": sampling_parameters()}
    for name in FAMILIES:
        experts = {"moe_intermediate_size": EXPERT_WIDTH} if "moe" in name else {}
        hf_config = config_of(name, **SIZES)
        hf_config.update(experts)
        folder = Path(sys.argv[1]) / name
        hf_config.save_pretrained(folder)
        rollout = RolloutConfig(dtype="bfloat16", kv_cache_gib=1.0)
        config = engine_config(str(folder), rollout, 1)
        found[name] = decided(config) | {"bytes": planned_bytes(str(folder), hf_config)}
        if name in ("qwen3", "qwen3-moe"):
            found[name]["fp8"] = in_fp8(folder, hf_config)
        if name == "olmo3":
            found["classes"] = classes_after_compilation(config)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
