"""Launched by test_extra_state.py on two ranks: modules with the extra state of Transformer Engine 2.11's.

A stand-in for what needs a GPU. ``get_extra_state`` and ``set_extra_state`` are those of its
``TransformerEngineBaseModule`` (pytorch/module/base.py) and ``BasicOperation`` (its norms) as far as a checkpoint sees
them: pickled tensors as a tensor of bytes, an empty one where there is nothing.

Argument: an empty folder. Each rank writes what it saw to ``FOLDER/rank-R.json``.
"""

from __future__ import annotations

import json
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402

from tempo_megatron.checkpoint.hf_engine import load_initial_weights  # noqa: E402
from tempo_megatron.checkpoint.megatron_state import load_role, plan_role  # noqa: E402
from tempo_megatron.locate import InitSource  # noqa: E402
from tempo_megatron.parallel.distributed import start  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tests.checkpoint.reshard_cases import Chain  # noqa: E402
from tests.checkpoint.reshard_worker import engine_under  # noqa: E402
from tests.model.hf_reference import save_reference  # noqa: E402
from tests.model.parity_cases import Layout, config_of  # noqa: E402

CHAIN = Chain("qwen3", "actor", "float32", True, (("tp2",),))
LAYOUTS = ("tp2", "pp2", "", "tp2 sp")


def get_extra_state(module: Any) -> Tensor | None:
    if not hasattr(module, "delayed_scaling"):  # the output layer is Megatron's own, which has none
        return None
    state = module.delayed_scaling
    if state is None:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def set_extra_state(module: Any, state: Tensor | None) -> None:
    if state is None or state.numel() == 0:
        return
    module.delayed_scaling = pickle.loads(state.detach().cpu().numpy().tobytes())  # of this test's own ranks


@contextmanager
def with_extra_states(engine: MegatronEngine) -> Iterator[None]:
    """The layers' linear layers and norms have them, as of Transformer Engine's classes; empty at first."""
    modules = [*linear_layers(engine).values(), *norms(engine)]
    for module in modules:
        module.delayed_scaling = None
    classes = {type(module) for module in modules}
    with pytest.MonkeyPatch.context() as patch:
        for cls in classes:
            patch.setattr(cls, "get_extra_state", get_extra_state, raising=False)
            patch.setattr(cls, "set_extra_state", set_extra_state, raising=False)
        yield


def linear_layers(engine: MegatronEngine) -> dict[str, Any]:
    """By the layer's number in the whole model, from 1, and the name within it."""
    return {
        f"{layer.layer_number}.{name}": module
        for model in engine.models
        for layer in model.decoder.layers
        for name, module in layer.named_modules()
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear))
    }


def norms(engine: MegatronEngine) -> list[Any]:
    return [layer.input_layernorm for model in engine.models for layer in model.decoder.layers]


def scales_of(name: str) -> dict[str, Any]:
    """Other numbers for every layer, as micro-batches would have left them."""
    numbers = torch.Generator().manual_seed(sum(name.encode()) * 1000 + int(name.partition(".")[0]))
    return {
        "recipe": {"amax_history_len": 4},
        "scale_fwd": torch.rand(3, generator=numbers),
        "amax_history_fwd": torch.rand(4, 3, generator=numbers),
        "scale_bwd": torch.rand(2, generator=numbers),
        "amax_history_bwd": torch.rand(4, 2, generator=numbers),
        "extra_fp8_variables": {"num_gemms": 1, "fp8_checkpoint": True},
    }


def same(found: Any, wanted: dict[str, Any]) -> bool:
    return found is not None and all(
        torch.equal(found[k], v) if isinstance(v, Tensor) else found[k] == v for k, v in wanted.items()
    )


def save(engine: MegatronEngine, folder: Path) -> None:
    role = plan_role(engine, folder)
    role.to_host()
    role.write(threading.Event())
    role.finish()


def main() -> None:
    start(threads=1, timeout_s=60)
    root = Path(sys.argv[1])
    model = root / CHAIN.model
    save_reference(config_of(CHAIN.family, **Layout(LAYOUTS[0]).model_changes), CHAIN.role, model)
    arrived: dict[str, list[bool]] = {}
    last = root / "without"
    with engine_under(CHAIN, LAYOUTS[0], model) as engine:
        load_initial_weights(engine, InitSource("hf", model, model))
        engine.start_optimizer()
        save(engine, last)
    for number, layout in enumerate(LAYOUTS):
        with engine_under(CHAIN, layout, model) as engine, with_extra_states(engine):
            engine.start_optimizer()
            load_role(engine, last, optimizer=True)
            layers = linear_layers(engine)
            if number == 0:  # saved by layers that have none
                fresh = [module.delayed_scaling is None for module in layers.values()]
                for name, module in layers.items():
                    module.delayed_scaling = scales_of(name)
            arrived[layout] = [same(module.delayed_scaling, scales_of(name)) for name, module in layers.items()]
            last = root / f"saved-{number}"
            save(engine, last)
    with engine_under(CHAIN, "tp2", model) as engine:  # and back in layers that have none
        engine.start_optimizer()
        load_role(engine, last, optimizer=True)
    (root / f"rank-{dist.get_rank()}.json").write_text(json.dumps({"fresh": fresh, "arrived": arrived}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
