"""Everything vLLM does to the process it lives in, kept away from the trainer that lives there too.

Written against vLLM 0.32, its CPU and its CUDA build; each item names the line of vLLM that needs it.
``prepare_process`` comes before vLLM is imported, ``shielded`` goes around every call that builds an engine.
"""

from __future__ import annotations

import glob
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempo_megatron.parallel.device import device, is_deterministic, use_cuda
from tempo_megatron.patching import kept, replace_function, replace_value

#: By which a user has vLLM log (envs.py).
_LOGGING = ("VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_CONFIG_PATH")
#: Where Linux shows shared memory by name (shm_overview(7)).
SHARED_MEMORY = Path("/dev/shm")


def prepare_process() -> None:
    """Set what vLLM reads from the environment at import; a value that the user has set stays.

    Raises nothing; calling it again changes nothing.
    """
    # v1/engine/llm_engine.py, from_engine_args: the engine core would run in a child process, out of our reach
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # usage/usage_lib.py, is_usage_stats_enabled: reports to a server
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # logger.py, _configure_vllm_root_logger: some fifty INFO and WARNING lines per engine and rank. Left to vLLM it
    # takes half a second per engine: dictConfig resets each of its loggers, and each reset walks all there are
    if not any(name in os.environ for name in _LOGGING):
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
        logging.getLogger("vllm").setLevel(logging.ERROR)
    # triton_utils/dispatcher.py walks all modules' attributes at import and touches deprecated ones
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.reduce_op.*")
    if is_deterministic():
        os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")
    if not use_cuda():
        # v1/sample/ops/logprobs.py, batched_count_greater_than is torch.compile'd: 10 s of C++ compilation on the
        # first step, per process. torch reads the variable at its own import, hence also the attribute.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        import torch._dynamo.config

        # torch/_library/triton.py says once per rank that there is no Triton
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
        replace_value(torch._dynamo.config, "disable", os.environ["TORCHDYNAMO_DISABLE"] == "1", bool)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Give the global random states (torch CPU, this GPU, numpy, random) back as they were.

    v1/worker/cpu_worker.py, init_device and compile_or_warm_up_model, and their GPU counterparts, call
    ``set_random_seed``; v1/sample/ops/topk_topp_sampler.py, forward_cpu, draws from the global generator at
    every step even when all requests have their own seeds.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if use_cuda() else []):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def _preserved_environment() -> Iterator[None]:
    """Undo what importing and starting vLLM on the CPU sets, apart from its own VLLM_* variables.

    platforms/cpu.py, check_and_update_config, sets LD_PRELOAD (for every later child process, such as the
    verifiers), LOCAL_WORLD_SIZE (torchrun's; set to the replica's size), NUMEXPR_MAX_THREADS and others.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for key in [k for k in os.environ if not k.startswith("VLLM_")]:
            if key not in before:
                del os.environ[key]
            elif os.environ[key] != before[key]:
                os.environ[key] = before[key]


@contextmanager
def _own_gpu() -> Iterator[None]:
    """v1/executor/uniproc_executor.py, _distributed_args, takes LOCAL_RANK for the number of the GPU to use."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device().index)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


@contextmanager
def _preserved_threads() -> Iterator[None]:
    """v1/worker/cpu_worker.py, init_device, binds threads and makes ``torch.set_num_threads`` do nothing."""
    threads = torch.get_num_threads()
    with kept(torch, "set_num_threads"):
        set_num_threads = torch.set_num_threads
        try:
            yield
        finally:
            set_num_threads(threads)


@contextmanager
def _preserved_streams() -> Iterator[None]:
    """Leave the trainer the streams that it has for the CPU (parallel/cpu_shim.py).

    v1/worker/cpu/shm.py puts others in their place as it is imported, whose ``record_event`` gives no event: a model of
    experts that is built later dies in Megatron's dispatcher.
    """
    with ExitStack() as stack:
        for name in ("Stream", "Event", "stream", "current_stream"):
            stack.enter_context(kept(torch.cuda, name))
        yield


@contextmanager
def shielded_import() -> Iterator[None]:
    """Around an import of vLLM, or the making of its settings, on the CPU: keep the trainer's process state."""
    with preserved_rng(), _preserved_environment(), _preserved_threads(), _preserved_streams():
        _settle_platform()
        yield


def _settle_platform() -> None:
    """On a machine without a GPU let vLLM's CUDA build plan as its CPU build does; before its modules are imported.

    platforms/__init__.py finds no platform there, a login node for example, and no settings can be made without one.
    """
    from vllm import platforms

    if platforms.current_platform.is_unspecified():
        from vllm.platforms.cpu import CpuPlatform

        replace_value(platforms, "_current_platform", CpuPlatform(), platforms.Platform)


@contextmanager
def shielded(shm_token: str) -> Iterator[None]:
    """Around the import of vLLM and the construction of an engine: keep the trainer's process state.

    Args:
        shm_token: unique to this engine on its hosts and the same on all its ranks.
    """
    with preserved_rng():
        if use_cuda():
            _guard_process_group()
            with _own_gpu(), hf_classes_compiled_apart():
                yield
            return
        with _preserved_environment(), _preserved_threads(), _preserved_streams():
            _guard_process_group()
            _keep_memory_policy()
            _name_shared_memory(shm_token)
            _repack_experts_on_reload()
            _leave_hf_classes_alone()
            _rebind_kernels_by_identity()
            yield


def _guard_process_group() -> None:
    """Deleting an engine must not destroy the trainer's process groups.

    v1/engine/core.py, EngineCore.shutdown (called by a finalizer, so also by garbage collection and at exit),
    ends with ``cleanup_dist_env_and_memory()``, which calls ``torch.distributed.destroy_process_group()``.
    """
    import vllm.v1.engine.core as core

    def keep_process_group() -> None:
        """vLLM's own groups go in ``RolloutEngine.close``, the trainer's when the trainer ends."""

    replace_function(core, "cleanup_dist_env_and_memory", keep_process_group, ("shutdown_ray",))


def _keep_memory_policy() -> None:
    """Leave the process's NUMA policy alone.

    v1/worker/cpu_worker.py, CPUWorker.__init__, calls ``torch.ops._C.init_cpu_memory_env``, which binds all later
    allocations of the process, the trainer's too, strictly to the NUMA node of its first CPU.
    """
    import vllm._custom_ops  # noqa: F401  (registers the operator)

    replace_function(torch.ops._C, "init_cpu_memory_env", lambda nodes: None, ("node_ids",), package="vllm")


def _name_shared_memory(token: str) -> None:
    """Name the TP ranks' shared memory by this engine, so that jobs on one host do not collide, and leave no names.

    distributed/device_communicators/cpu_communicator.py, _CPUSHMDistributed.make_group_name, uses
    VLLM_DIST_IDENT, which v1/worker/cpu_worker.py, init_device, sets to "//" for every job under torchrun:
    the second job dies of "create shm in SHMManager failed. errno: 17", as does one that follows a killed job.
    _init_cpu_shm ends with a barrier behind the last rank that opens a segment: without its name the memory goes with
    the processes, however they end.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator, _CPUSHMDistributed

    def make_group_name(communicator: CpuCommunicator) -> str:
        ranks = "-".join(str(rank) for rank in communicator.ranks)
        return f"tempo-{token}-{communicator.unique_name}-[{ranks}]-cpushm"

    def init_cpu_shm(shared: _CPUSHMDistributed) -> int:
        handle: int = original(shared)
        # the rank counts in its group: other replicas of this host have segments of the same number
        for segment in SHARED_MEMORY.glob(f"{glob.escape(shared.group_name)}*_{shared.communicator.rank}"):
            segment.unlink()
        return handle

    replace_function(_CPUSHMDistributed, "make_group_name", make_group_name, ("communicator",))
    original = replace_function(_CPUSHMDistributed, "_init_cpu_shm", init_cpu_shm, ("self",))


def _repack_experts_on_reload() -> None:
    """Let a reload of a mixture-of-experts layer end in the layout that the CPU kernel reads.

    model_executor/layers/fused_moe/unquantized_fused_moe_method.py, _setup_kernel, pads and packs the expert weights
    on the first load only (``if not is_weight_update``). A reload would copy the unpacked weights of a checkpoint
    into the packed tensors: garbage, silently, or a shape error where the kernel wants padding.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    def set_up_kernel(method: UnquantizedFusedMoEMethod, layer: torch.nn.Module, w13: Tensor, w2: Tensor) -> None:
        """``w13`` and ``w2`` are the layer's own parameters; the CPU backend packs those."""
        if method.moe_kernel is None:
            method._init_moe_kernel(layer)
        method.moe_kernel.fused_experts.process_weights_after_loading(layer)

    replace_function(UnquantizedFusedMoEMethod, "_setup_kernel", set_up_kernel, ("self", "layer", "w13", "w2"))


_DECORATE = ("self", "cls", "dynamic_arg_dims", "enable_if", "is_encoder")


def _leave_undecorated(model: object, cls: type, *args: object, **kwargs: object) -> None:
    """vLLM reads nothing of what the decorator would have added when the model is eager."""


def _leave_hf_classes_alone() -> None:
    """Keep transformers' model classes usable for models that are not vLLM's.

    A model that vLLM has no class of its own for (OLMo-3 in 0.32) is built from transformers' class, and
    model_executor/models/transformers/base.py, _decorate_cls_for_torch_compile, replaces ``__init__``, ``__call__``
    and ``__bases__`` of that class (``Olmo3Model``) for the whole process: from then on it cannot be built outside
    an engine, nor can earlier instances be called. Engines on the CPU are eager (``enforce_eager``): compilation mode
    NONE, in which the replacements do nothing.
    """
    from vllm.model_executor.models.transformers.base import Base

    replace_function(Base, "_decorate_cls_for_torch_compile", _leave_undecorated, _DECORATE)


@contextmanager
def hf_classes_compiled_apart() -> Iterator[None]:
    """Around the building of an engine that compiles: the same as ``_leave_hf_classes_alone``, for GPUs.

    vLLM decorates, and AutoModel then makes, a subclass that nobody else knows.
    """
    from transformers import AutoModel
    from vllm.model_executor.models.transformers.base import Base

    made = AutoModel._model_mapping  # configuration class -> model class; what was registered comes first

    def decorate(model: Any, cls: type, *args: Any, **kwargs: Any) -> None:
        own = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
        original(model, own, *args, **kwargs)
        made.register(type(model.text_config), own, exist_ok=True)

    with kept(Base, "_decorate_cls_for_torch_compile"), kept(made, "_extra_content"):
        replace_value(made, "_extra_content", dict(made._extra_content), dict)
        original = replace_function(Base, "_decorate_cls_for_torch_compile", decorate, _DECORATE)
        yield


@contextmanager
def hf_classes_left_alone() -> Iterator[None]:
    """Around the building of a model of vLLM that nothing will run: ``_leave_hf_classes_alone``, on every device."""
    from vllm.model_executor.models.transformers.base import Base

    with kept(Base, "_decorate_cls_for_torch_compile"):
        _leave_hf_classes_alone()
        yield


def _rebind_kernels_by_identity() -> None:
    """Replace Triton's kernels by C++ ones in one quick pass over all modules.

    triton_utils/dispatcher.py, _rebind_kernels, compares each attribute of each module with each kernel, a quarter of a
    million of them one by one. This does the same by a table of identities.
    """
    from vllm.triton_utils import dispatcher

    def rebind(overrides: list[tuple[object, object]]) -> None:
        wrappers = {id(original): wrapper for original, wrapper in overrides}
        for module in list(sys.modules.values()):
            for name, value in list((getattr(module, "__dict__", None) or {}).items()):
                if (wrapper := wrappers.get(id(value))) is not None:
                    setattr(module, name, wrapper)
                elif (wrapper := wrappers.get(id(_attributes(value).get("kernel")))) is not None:
                    value.kernel = wrapper
                    if not isinstance(value, type):
                        value.__dict__.pop("_kernel_arg_names", None)

    replace_function(dispatcher, "_rebind_kernels", rebind, ("overrides",))


def _attributes(value: Any) -> Mapping[str, object]:
    """The object's own, without a look at its class, which might compute them."""
    return vars(value) if hasattr(value, "__dict__") else {}
