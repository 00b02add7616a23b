"""Run unmodified Megatron-Core 0.16.1 on CPU over gloo.

``install()`` must run before other ``megatron.core`` imports.  It does nothing on a machine with a GPU.
Each patch names what in Megatron-Core needs it.  No patch changes a number: they redirect device names,
replace CUDA-only bookkeeping and give CPU the optimizer interface that Transformer Engine gives GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
import warnings
from typing import Any

import torch
import torch.utils._device

from tempo_megatron.imports import absent
from tempo_megatron.parallel.device import device as current_device
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.patching import replace_function, replace_value, set_global, unless_native

_CPU = torch.device("cpu")
_installed = False


def install() -> bool:
    """Patch torch and megatron.core for CPU training; True if this call did it, False if not needed."""
    global _installed
    if _installed or use_cuda():
        return False
    _installed = True
    _quieten_megatron()
    _patch_torch_cuda()
    _patch_factories()
    _patch_rng()
    _patch_tensor_type()
    _patch_megatron()
    return True


def _quieten_megatron() -> None:
    # at import Megatron warns once per module that Transformer Engine and Apex are absent: on CPU that is the plan
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|apex|flash|Flash|mamba|nvidia).*")
    warnings.filterwarnings("ignore", message=".*(lru_cache|CPU RNG state changed|torch.jit.script).*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*`load_state_dict` is deprecated.*")
    warnings.filterwarnings("ignore", message=".*(full scope is deprecated|CUDA_DEVICE_MAX_CONNECTIONS).*")
    warnings.filterwarnings("ignore", message=".*grad attribute of a Tensor.*")
    # said of each expert that is not cut while the layers around it are
    warnings.filterwarnings("ignore", message=".*Disabling sequence parallel.*")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


class _NoStream:
    """Stands in for torch.cuda.Stream and Event, the trainer's and vLLM's: a CPU has one stream."""

    device = _CPU

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, *_: Any) -> _NoStream:
        return self

    def elapsed_time(self, *_: Any) -> float:
        return 0.0


def _patch_torch_cuda() -> None:
    nothing: dict[str, tuple[str, ...]] = {
        "set_device": ("device",),
        "synchronize": ("device",),  # batched p2p (p2p_communication.py), timers
        "empty_cache": (),
    }
    for name, parameters in nothing.items():
        replace_function(torch.cuda, name, lambda *_, **__: None, parameters)
    for name, parameters in {"range_push": ("msg",), "range_pop": ()}.items():
        replace_function(torch.cuda.nvtx, name, lambda *_, **__: None, parameters)
    # p2p buffers, DDP buffers, rope tables: device=torch.cuda.current_device()
    replace_function(torch.cuda, "current_device", current_device, ())
    for name in ("Stream", "Event"):  # all-to-all dispatcher, DDP overlap
        replace_value(torch.cuda, name, _NoStream, type)
    for name in ("current_stream", "default_stream"):
        replace_function(torch.cuda, name, lambda *_, **__: _NoStream(), ("device",))
    replace_function(torch.cuda, "stream", lambda *_, **__: contextlib.nullcontext(), ("stream",))
    # clip_grads.py, tensor_parallel/data.py
    replace_function(
        torch.Tensor, "cuda", lambda self, *_, **__: self if self.is_meta else self.to(current_device()), None
    )


def _patch_factories() -> None:
    """device="cuda" literals in schedules.py (total_num_tokens), clip_grads.py, FullyParallel checkpoint strategies."""

    def redirect(name: str) -> None:
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            where = kwargs.get("device")
            if where is not None and torch.device(where).type == "cuda":
                kwargs["device"] = current_device()
            tensor: torch.Tensor = original(*args, **kwargs)
            return tensor

        original = replace_function(torch, name, wrapped, None)
        functools.update_wrapper(wrapped, original)

    # fill the cache that `with torch.device(...)` uses before wrapping: it must hold the original factories
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        redirect(name)


def _patch_rng() -> None:
    """tensor_parallel/random.py keeps CUDA generator states: here the CPU generator is that generator."""
    # not torch.manual_seed, which calls cuda.manual_seed_all and so would recurse
    replace_function(torch.cuda, "manual_seed", lambda seed: torch.default_generator.manual_seed(int(seed)), ("seed",))
    for module in (torch.cuda, torch.cuda.random):
        replace_function(module, "get_rng_state", lambda *_, **__: torch.get_rng_state(), ("device",))
        replace_function(
            module, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state), ("new_state", "device")
        )


def _patch_tensor_type() -> None:
    """optimizer.py, distrib_optimizer.py and clip_grads.py compare tensor.type() with 'torch.cuda.FloatTensor'."""

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        name = original(self)
        return f"torch.cuda.{name.rpartition('.')[2]}" if self.device.type in ("cpu", "meta") else name

    original = replace_function(torch.Tensor, "type", tensor_type, None)


class CpuFusedAdam(torch.optim.Optimizer):
    """AdamW with Transformer Engine's FusedAdam interface: ``step`` lives in the parameter group.

    torch's own AdamW keeps ``step`` per parameter, on which DistributedOptimizer's sharded load fails
    (distrib_optimizer.py asserts one step per group when apex or TE are in use, as on GPUs).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        **_: Any,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        update = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            # after endless steps nothing is left of the bias
            step = torch.tensor(float(group["step"]) if group["bias_correction"] else math.inf)
            update(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


class _WeightGradients:
    """In place of Apex's kernels: the gradient of a weight is added to ``main_grad`` by the product that makes it."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: torch.Tensor, by_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        if inputs.dtype == main_grad.dtype:
            main_grad.addmm_(by_output.t(), inputs)
        else:
            main_grad += by_output.t() @ inputs


def _patch_megatron() -> None:
    with absent("wandb"):  # timers.py imports it, a quarter of a second, for a writer that nobody here gives it
        import megatron.core.jit

    megatron.core.jit.disable_jit_fuser()  # torch.compile of small helpers at import: slow to start, no gain here

    import megatron.core.tensor_parallel.random as random

    # these two go to torch.cuda.default_generators directly
    replace_function(
        random,
        "_get_cuda_rng_state",
        lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
        ("device", "clone", "graph_safe"),
    )
    replace_function(
        random,
        "_set_cuda_rng_state",
        lambda state, device=-1, graph_safe=False: torch.set_rng_state(state),
        ("new_state", "device", "graph_safe"),
    )

    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    for module in (optimizer, distrib_optimizer):
        replace_value(module, "Adam", CpuFusedAdam, type)
    replace_value(optimizer, "USING_PYTORCH_OPTIMIZER", False, bool)
    replace_value(distrib_optimizer, "HAVE_APEX_OR_TE", True, bool)
    replace_value(distrib_optimizer, "USING_APEX_OPTIMIZER", True, bool)

    import megatron.core.tensor_parallel.layers as layers

    backward = inspect.unwrap(layers.LinearWithGradAccumulationAndAsyncCommunication.backward)
    set_global(layers, "fused_weight_gradient_mlp_cuda", _WeightGradients, backward)
    replace_value(layers, "_grad_accum_fusion_available", True, bool)

    _patch_moe()
    _patch_uneven_collectives()
    _patch_copies()


def _patch_moe() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    # without TE 0.16.1 does not define it
    set_global(moe_utils, "te_general_gemm", None, moe_utils.RouterGatingLinearFunction.forward)

    # moves only CUDA tensors, so that the split sizes of the all-to-all stay tensors: gloo wants numbers
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    parameters = ("tensor", "as_numpy", "record_stream")
    original = replace_function(moe_utils, "maybe_move_tensor_to_cpu", move, parameters)
    replace_function(token_dispatcher, "maybe_move_tensor_to_cpu", move, parameters)


def _patch_uneven_collectives() -> None:
    """Expert-tensor parallel ranks exchange unequal numbers of tokens (token_dispatcher.py): gloo wants equal ones."""
    import megatron.core.tensor_parallel.mappings as mappings

    def gather_uneven(tensor: torch.Tensor, group: Any, sizes: list[int] | None = None, *rest: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather(tensor, group, None, *rest)
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        every = padded.new_empty(len(sizes), *padded.shape)
        torch.distributed.all_gather_into_tensor(every.flatten(0, 1), padded, group=group)
        return torch.cat([part[:n] for part, n in zip(every, sizes, strict=True)])

    def reduce_scatter_uneven(
        tensor: torch.Tensor, group: Any, sizes: list[int] | None = None, *rest: Any
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return reduce_scatter(tensor, group, None, *rest)
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].contiguous()

    gather = replace_function(
        mappings,
        "_gather_along_first_dim",
        gather_uneven,
        ("input_", "group", "output_split_sizes", "use_global_buffer"),
    )
    reduce_scatter = replace_function(
        mappings,
        "_reduce_scatter_along_first_dim",
        reduce_scatter_uneven,
        ("input_", "group", "input_split_sizes", "use_global_buffer"),
    )


def _patch_copies() -> None:
    """Copies of all gradients or parameters that a GPU is spared: in clipping, and where one rank reduces alone."""
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.optimizer.clip_grads as clip_grads

    def scale(chunk_size: int, noop_flag: Any, tensor_lists: Any, factor: Any) -> None:
        for source, target in zip(*tensor_lists, strict=True):
            torch.mul(source, factor, out=target)

    takes = unless_native(clip_grads, "multi_tensor_scale_impl", ("chunk_size", "noop_flag", "tensor_lists", "scale"))
    replace_function(clip_grads, "multi_tensor_scale_impl", scale, takes)

    def spare(name: str, parameters: tuple[str, ...]) -> None:
        def collective(output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
            # NCCL sees that input and output of a single rank are one place, gloo does not
            if group.size() == 1 and output.data_ptr() == input.data_ptr():
                return None
            return original(output, input, *args, group=group, **kwargs)

        original = replace_function(buffers, name, collective, parameters)

    spare("dist_reduce_scatter_func", ("output", "input", "op", "group", "async_op"))
    spare("dist_all_gather_func", ("output_tensor", "input_tensor", "group", "async_op"))
