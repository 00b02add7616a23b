"""What vLLM holds, number by number, and its own way of loading a checkpoint: what updates are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tempo_megatron.rollout.engine import RolloutEngine


def load_by_vllm(engine: RolloutEngine, tensors: Mapping[str, Tensor]) -> None:
    """``reload_weights`` of whole tensors, and what it forgets: the packed copy of a tied output layer."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    def pack(model: torch.nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    with torch.no_grad():
        engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})
    engine._llm.apply_model(pack)
    assert engine._llm.reset_prefix_cache()


def held(engine: RolloutEngine) -> dict[str, Tensor]:
    """Parameters, and packed weights by their products with the identity: exact, each sum has one term."""
    (found,) = engine._llm.apply_model(_held)
    return found  # type: ignore[no-any-return]


@torch.no_grad()
def _held(model: torch.nn.Module) -> dict[str, Tensor]:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    found = {}
    output = getattr(model, "lm_head", None)
    for name, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            if value.numel():
                found[f"{name}.{parameter}"] = value.data.clone()
        if (
            isinstance(module, VocabParallelEmbedding)
            and not isinstance(module, ParallelLMHead)
            and module is not output
        ):
            continue  # nothing reads its packed copy
        if hasattr(module, "cpu_linear"):
            width = get_layerwise_info(module).restore_metadata[0]["weight"].shape[1]
            found[f"{name}.packed"] = module.cpu_linear(torch.eye(width), getattr(module, "weight", None), None)
    return found
