"""Which models vLLM can sample from, told without vLLM: by whoever wants to know it before the engine is built."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from tempo_megatron.errors import TempoError
from tempo_megatron.rollout import fp8

#: vLLM's sizes on the CPU: CPUAttentionBackend.get_supported_head_sizes and CPUUnquantizedExperts.output_alignment.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
CPU_EXPERTS_ALIGNMENT = 32


def check_model(
    hf_dir: str,
    hf_config: PretrainedConfig,
    tensor_parallel_size: int,
    *,
    on_cpu: bool,
    expert_parallel: bool = False,
    weights: str = "trained",
) -> None:
    """Refuse by name what vLLM would meet as a bare assertion, or only at its first step with the whole model loaded.

    Raises:
        TempoError: a size of the model is one that vLLM's kernels or its tensor-parallel layers cannot take.
    """
    file, split = f"{hf_dir}/config.json", f"rollout.tensor_parallel_size: {tensor_parallel_size}"
    if hf_config.model_type == "olmo3" and hf_config.num_key_value_heads % tensor_parallel_size:
        # fewer KV heads than ranks are doubled, for which the norm over all of k has no place:
        # models/transformers/fusers/rms_norm.py, TPAwareNormMixin.forward
        raise TempoError(
            f"{split} does not divide num_key_value_heads {hf_config.num_key_value_heads} ({file}), as OLMo-3 needs it"
        )
    experts_width = getattr(hf_config, "moe_intermediate_size", None)
    if expert_parallel and experts_width is None:
        raise TempoError(f"rollout.expert_parallel: true must be false: the model has no experts ({file})")
    if expert_parallel and hf_config.num_experts % tensor_parallel_size:
        raise TempoError(f"{split} does not divide num_experts {hf_config.num_experts} ({file})")
    if experts_width is not None and not expert_parallel and experts_width % tensor_parallel_size:
        raise TempoError(f"{split} does not divide moe_intermediate_size {experts_width} ({file})")
    head_dim, heads = getattr(hf_config, "head_dim", None), hf_config.num_attention_heads
    if hf_config.model_type == "qwen2" and head_dim not in (None, hf_config.hidden_size // heads):
        raise TempoError(
            f"{file}: head_dim {head_dim} is not hidden_size {hf_config.hidden_size} / num_attention_heads {heads}, "
            "which vLLM's Qwen2 takes for it"
        )
    if weights == "fp8":
        if on_cpu and not fp8.cpu_multiplies():
            raise TempoError(
                "rollout.weights: fp8 takes a GPU that has FP8, or a CPU with AMX; fp8-emulated has the same weights"
            )
        fp8.check_blocks(file, hf_config, tensor_parallel_size)
    if not on_cpu:
        return
    if expert_parallel:
        raise TempoError("rollout.expert_parallel: true must be false: vLLM's kernels for the CPU compute all experts")
    head_dim = head_dim or hf_config.hidden_size // heads
    if head_dim not in CPU_HEAD_SIZES:
        raise TempoError(f"{file}: head_dim {head_dim} is not one that vLLM runs on the CPU: {list(CPU_HEAD_SIZES)}")
    if experts_width is not None and hf_config.hidden_size % CPU_EXPERTS_ALIGNMENT:
        raise TempoError(
            f"{file}: hidden_size {hf_config.hidden_size} is not a multiple of {CPU_EXPERTS_ALIGNMENT}, as vLLM needs "
            "it for experts on the CPU"
        )


def read_hf_config(hf_dir: str | Path) -> PretrainedConfig:
    """Of the policy's folder; TempoError where it has none."""
    if not (Path(hf_dir) / "config.json").is_file():
        raise TempoError(f"{hf_dir}: no config.json; the rollout engine needs the policy's HF folder")
    return AutoConfig.from_pretrained(str(hf_dir), local_files_only=True)
