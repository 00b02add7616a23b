"""Run by test_cuda_env.py: delayed scaling's state of a real Transformer Engine layer, to tensors and into another.

Its state is made on the CPU, where a layer that has run on a GPU has it there. Prints a JSON object.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from tests.cuda_env import hopper

hopper.without_driver()

from tempo_megatron.parallel import cpu_shim  # noqa: E402

cpu_shim.install()

from megatron.core.fp8_utils import get_fp8_recipe  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from transformer_engine.pytorch import Linear, quantization  # noqa: E402

from tempo_megatron.model import te_scales  # noqa: E402
from tempo_megatron.model.fp8 import HISTORY, SCALES  # noqa: E402

LENGTH = 4


def layer() -> Any:
    made = Linear(16, 16, bias=False, device="cpu")
    made.config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=1, fp8="hybrid", fp8_recipe="delayed",
        fp8_amax_history_len=LENGTH, fp8_amax_compute_algo="max",
    )  # fmt: skip
    return torch.nn.ModuleDict({"linear": made})


def main() -> None:
    hopper.shown_to_transformer_engine()
    # a layer makes its state on "cuda" unless it is told otherwise
    state = quantization.DelayedScalingRecipeState
    original = state.__init__
    state.__init__ = lambda self, *a, **k: original(self, *a, **{**k, "device": torch.device("cpu")})
    first, second = layer(), layer()
    recipe = get_fp8_recipe(first["linear"].config)
    te_scales.make_room(first)
    for key in ("scaling_fwd", "scaling_bwd"):
        meta = first["linear"].fp8_meta[key]
        meta.scale.copy_(torch.arange(1.0, 1 + meta.scale.numel()))
        meta.amax_history.copy_(torch.arange(meta.amax_history.numel()).view_as(meta.amax_history))
    te_scales.collect(first)
    kept = {key: value for key, value in first.state_dict().items() if key.endswith((HISTORY, SCALES))}
    te_scales.make_room(second)
    second.load_state_dict(kept, strict=False)
    te_scales.restore(second)
    forward, backward = (second["linear"].fp8_meta[key] for key in ("scaling_fwd", "scaling_bwd"))
    # a forward would ask for this, and must find the state as it is
    with te_scales._current(recipe):
        second["linear"].set_meta_tensor(True, recipe)
    found = {
        "length": recipe.amax_history_len,
        "kept": sorted(kept),
        "scale": [forward.scale.tolist(), backward.scale.tolist()],
        "newest": [forward.amax_history[0].tolist(), backward.amax_history[0].tolist()],
        "same": second["linear"].fp8_meta["scaling_fwd"] is forward,
        "quantisers": [q.scale.item() for q in second["linear"].quantizers["scaling_fwd"]],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
