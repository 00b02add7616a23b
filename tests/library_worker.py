"""Launched by test_library_assumptions.py: applies every patch, then takes each target away and applies it again.

Prints one JSON object: "gone": target -> what was told without it; "unread": those of the pairs (function, name) given
as the JSON argument in which the function does not mention the name; "outside": globals of Megatron's layouts that
``parallel/groups.py`` does not switch.
"""

from __future__ import annotations

import contextlib
import dis
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import CodeType
from typing import Any

import torch

from tempo_megatron import patching
from tempo_megatron.errors import TempoError
from tempo_megatron.parallel import cpu_shim

Target = tuple[Any, str]


def build_model(name: str) -> None:
    """The model with its optimizer; of Qwen3 a critic with its value head."""
    from tempo_megatron.config.schema import CriticConfig, OptimizerConfig, ParallelConfig, RoleConfig
    from tempo_megatron.parallel.groups import ModelParallelGroups
    from tempo_megatron.training.engine import MegatronEngine
    from tests.model.parity_cases import config_of

    layout = ParallelConfig()
    groups = ModelParallelGroups(layout, 60)
    settings = {"init": "-", "dtype": "bfloat16", "layer_spec": "torch", "parallel": layout}
    optimizer = OptimizerConfig(lr=1e-3, distributed=False)
    role, kind = ("critic", CriticConfig) if name == "qwen3" else ("actor", RoleConfig)
    try:
        config = kind(**settings, optimizer=optimizer)
        MegatronEngine(role, config, config_of(name), groups, seed=1).start_optimizer()
    finally:
        groups.close()


def build_vllm() -> None:
    from tempo_megatron.rollout import patches
    from tempo_megatron.rollout.sleep import drop_packed

    patches.prepare_process()
    with patches.shielded("token"):
        pass
    layer = torch.nn.Module()  # as model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm, leaves one
    layer.cpu_linear = torch.nn.functional.linear
    drop_packed(layer)


def build_fp8_twin() -> None:
    from types import SimpleNamespace

    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    from tempo_megatron.rollout.landings import _without_kernels

    with _without_kernels(SimpleNamespace(quant_config=Fp8Config(weight_block_size=[128, 128]))):
        pass


def make_groups() -> None:
    from tempo_megatron.parallel.gloo import share_devices

    share_devices()


def make_groups_of_one_backend() -> None:
    from tempo_megatron.parallel.groups import alone

    with alone("nccl"):
        pass


def play_a_rank() -> None:
    from tempo_megatron.parallel.played import Wire, patched

    with patched(Wire()):
        pass


def write_checkpoints() -> None:
    from tempo_megatron.checkpoint import inprocess_writer, own_state

    inprocess_writer.install()
    own_state.install()


INSTALLERS: list[Callable[[], Any]] = [
    cpu_shim._patch_torch_cuda,
    cpu_shim._patch_factories,
    cpu_shim._patch_rng,
    cpu_shim._patch_tensor_type,
    cpu_shim._patch_megatron,
    partial(build_model, "qwen3"),
    partial(build_model, "qwen3-moe"),
    partial(build_model, "olmo3"),  # YaRN
    build_vllm,
    build_fp8_twin,
    write_checkpoints,
    make_groups,
    make_groups_of_one_backend,
    play_a_rank,
]


def name_of(owner: Any, name: str) -> str:
    if hasattr(owner, "__path__") or type(owner).__name__ in ("module", "_OpNamespace", "ConfigModuleInstance"):
        return f"{owner.__name__}.{name}"
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}.{name}"


def applied(install: Callable[[], Any]) -> dict[str, Target]:
    """What the installer asks for, by name; an object of a class stands for all of them."""
    found: dict[str, Target] = {}
    present = patching._present

    def record(owner: Any, name: str, package: str | None = None) -> Any:
        found.setdefault(name_of(owner, name), (owner, name))
        return present(owner, name, package)

    patching._present = record
    try:
        install()
    finally:
        patching._present = present
    return found


@contextlib.contextmanager
def renamed(owner: Any, name: str) -> Iterator[None]:
    """The library without this name: taken out of the module or class, or hidden where Python cannot take it out."""
    own = vars(owner).get(name) if hasattr(owner, "__dict__") else None
    is_static = own is not None and (isinstance(owner, type) or type(owner).__name__ == "module")
    if is_static:
        delattr(owner, name)
    if not is_static or hasattr(owner, name):
        target = name_of(owner, name)

        def without(other: Any, attribute: str, *default: Any) -> Any:
            if name_of(other, attribute) == target:
                raise AttributeError
            return getattr(other, attribute, *default)

        patching.getattr = without
    try:
        yield
    finally:
        vars(patching).pop("getattr", None)
        if is_static:
            setattr(owner, name, own)


def mentions(function: str, name: str) -> bool:
    """Whether the code of ``module:qualified.name``, or a function inside it, has ``name`` as a name or a string."""
    module, _, path = function.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is None:
        return False
    for _, original, ours in patching._replaced.values():
        found = original if found is ours else found
    code = [inspect.unwrap(found).__code__]
    while code:
        one = code.pop()
        if name in one.co_names or name in one.co_consts:
            return True
        code += [constant for constant in one.co_consts if isinstance(constant, CodeType)]
    return False


def globals_outside_the_layouts() -> list[str]:
    """Globals that ``initialize_model_parallel`` stores, apart from those that are switched with the layout."""
    from megatron.core import parallel_state

    from tempo_megatron.parallel.groups import _layout_globals

    stored = {
        instruction.argval
        for instruction in dis.get_instructions(parallel_state.initialize_model_parallel)
        if instruction.opname == "STORE_GLOBAL"
    }
    assert "_TENSOR_MODEL_PARALLEL_GROUP" in stored
    return sorted(stored - set(_layout_globals()))


def told_without(installers: Sequence[Callable[[], Any]]) -> dict[str, str]:
    """Target -> what is told when the installer that replaces it is called where it is absent."""
    told: dict[str, str] = {}
    for install in installers:
        for target, (owner, name) in applied(install).items():
            if target in told:
                continue
            with renamed(owner, name):
                try:
                    install()
                    told[target] = "nothing"
                except TempoError as error:
                    told[target] = str(error)
                except AttributeError as error:  # taken for granted before the helper was asked
                    told[target] = f"AttributeError: {error}"
    return told


def main() -> None:
    from tempo_megatron.parallel.distributed import start

    cpu_shim.install()
    start(threads=1, timeout_s=60)
    told = told_without(INSTALLERS)
    unread = [pair for pair in json.loads(sys.argv[1]) if not mentions(*pair)]
    print(json.dumps({"gone": told, "unread": unread, "outside": globals_outside_the_layouts()}))


if __name__ == "__main__":
    main()
