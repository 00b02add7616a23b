"""vLLM's parameters as what an update writes into: in place, or module by module where vLLM finishes them itself.

A parameter that vLLM holds as its loader fills it is written where it lies. A module that is changed after loading
(packed for the CPU's kernels, quantised, in a kernel's own layout) gets tensors as the loader wants them for the time
of its bucket, in one scratch buffer, and vLLM's own step for that module then makes of them what it holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tempo_megatron.errors import RunError
from tempo_megatron.parallel.device import device, use_cuda
from tempo_megatron.reshard.plan import Destination, Plan, Target
from tempo_megatron.reshard.regions import as_matrix
from tempo_megatron.rollout.landings import build_twin, record_destination
from tempo_megatron.rollout.sleep import drop_packed, is_dropped

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class RolloutWeights:
    """One rank's part of a vLLM model.

    Args:
        model: as vLLM samples from it.
        config: the engine's.
        tensors: names and shapes of the HF tensors that will come.

    Attributes:
        destination: what its loader takes of them.

    Raises:
        TempoError: the loader does not take all of them, or a parameter gets no values.
    """

    def __init__(self, model: torch.nn.Module, config: VllmConfig, tensors: Mapping[str, tuple[int, ...]]) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        twin = build_twin(config)
        units = {
            f"{name}.{parameter}" if name else parameter: name
            for name, module in self._modules.items()
            if _is_changed_after_loading(module)
            for parameter, _ in twin.get_submodule(name).named_parameters(recurse=False)
        }
        self.destination = record_destination(twin, tensors, config.model_config.dtype, units)
        self._packing = {name: module for name, module in self._modules.items() if hasattr(module, "cpu_linear")}
        self._needed = {n: m for n, m in self._packing.items() if not _is_plain_embedding(m, model)}
        self._unfinished: set[str] = set()
        self._heads = [m for m in self._needed.values() if m.get_parameter("weight").numel()]

    def receiver(self, plan: Plan, rank: int) -> RolloutReceiver:
        return RolloutReceiver(self, plan, rank)

    def live(self, name: str) -> Tensor:
        """A parameter as vLLM holds it."""
        module, _, parameter = name.rpartition(".")
        tensor: Tensor = self._modules[module].get_parameter(parameter).data
        return tensor

    def only_packs(self, name: str) -> bool:
        """Whether vLLM's step for a module reads its weights, and keeps nothing but a packed copy of its own."""
        from vllm import _custom_ops
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod
        from vllm.platforms import current_platform

        method = getattr(self._modules[name], "quant_method", None)
        packs = not use_cuda() and _custom_ops._supports_onednn and not current_platform.is_zen_cpu()
        return packs and isinstance(method, UnquantizedLinearMethod)

    def load_whole(self, tensors: list[tuple[str, Tensor]]) -> None:
        """By vLLM's loader, of modules that are open."""
        self._model.load_weights(iter(tensors))  # type: ignore[operator]

    def begin(self) -> None:
        """From now on nothing of it is fit for sampling before it has been made anew.

        Packed copies of modules go when these are opened, one at a time, so that the next takes their memory.
        """
        self._unfinished = {target.unit for target in self.destination.targets if target.unit is not None}
        for module in self._packing.values():
            if module.get_parameter("weight").numel():  # an embedding or an output layer
                drop_packed(module)

    def open(self, unit: str) -> _OpenModule:
        """A module whose tensors are about to come."""
        return _OpenModule(self._modules[unit])

    def finish(self, unit: str, module: _OpenModule) -> None:
        module.finish()
        self._unfinished.discard(unit)

    def finish_heads(self) -> None:
        """Let output layers, which keep their weight, see what was written in place.

        model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm, packs a copy of it on the CPU; of an embedding
        that is no output layer nothing reads one.
        """
        for module in self._heads:
            module.quant_method.process_weights_after_loading(module)

    def require_finished(self) -> None:
        """RunError where vLLM's step for a module was not done."""
        dropped = {name for name, module in self._needed.items() if is_dropped(module)}
        if self._unfinished | dropped:
            name = min(self._unfinished | dropped)
            raise RunError(f"rollout: vLLM did not finish {name} in an update of the weights")


class RolloutReceiver:
    """The targets of a plan on this rank, for one update after the other (``reshard.transfer.Receiver``).

    Attributes:
        on_arrived: called with each target, as a matrix, when it holds everything that it gets; the last argument says
            whether it is the trainer's own memory.
    """

    def __init__(self, weights: RolloutWeights, plan: Plan, rank: int) -> None:
        self._weights = weights
        self._destination: Destination = plan.destination_of(rank)
        within = rank % plan.replica_size
        targets = self._destination.targets
        self.on_arrived: Callable[[int, Tensor, bool], None] = lambda target, matrix, is_lent: None
        units = {target.unit for target in targets} - {None, *self._destination.whole}
        packing = {unit for unit in units if unit is not None and weights.only_packs(unit)}
        # biases are not packed: they stay where they are
        self._borrowing = {n for n, t in enumerate(targets) if t.unit in packing and len(t.shape) > 1}
        self._lent: Mapping[int, Tensor] = {}
        self._in_place = [n for n, target in enumerate(targets) if target.unit is None]
        self._staged: defaultdict[int, dict[str, list[int]]] = defaultdict(dict)  # bucket -> unit -> targets
        for piece in plan.pieces[within]:
            unit = targets[piece.target].unit
            if unit is not None:
                staged = self._staged[piece.bucket].setdefault(unit, [])
                if piece.target not in staged:
                    staged.append(piece.target)
        self._scratch: Tensor | None = None
        self._matrices: dict[int, Tensor] = {}
        self._open: dict[str, _OpenModule] = {}

    def begin(self) -> None:
        """Addresses are those of now."""
        self._weights.begin()
        targets = self._destination.targets
        self._matrices = {}
        for n in self._in_place:
            live = self._weights.live(targets[n].name)
            _require_alike(live, targets[n])
            self._matrices[n] = as_matrix(live)
        for target, region in self._destination.fills:
            if target in self._matrices:
                region.of(self._matrices[target]).zero_()

    def end(self) -> None:
        """Everything is there; what was written in place is read only now, when nothing more is written."""
        for n in self._in_place:
            self.on_arrived(n, self._matrices[n], False)
        self._matrices = {}
        self._weights.finish_heads()
        self._weights.require_finished()

    def borrows(self, target: int) -> bool:
        return target in self._borrowing

    def open(self, bucket: int, lent: Mapping[int, Tensor]) -> None:
        self._lent = lent
        targets, start = self._destination.targets, 0
        to_come = [n for staged in self._staged.get(bucket, {}).values() for n in staged if n not in lent]
        size = sum(targets[n].room for n in to_come)
        self._scratch = torch.empty(size, dtype=torch.uint8, device=device())
        for unit, staged in self._staged.get(bucket, {}).items():
            module = self._weights.open(unit)
            self._open[unit] = module
            whole = unit in self._destination.whole
            for n in staged:
                target = targets[n]
                if n in lent:
                    room = lent[n].view(target.shape)
                else:
                    room = (
                        self._scratch[start : start + target.nbytes]
                        .view(getattr(torch, target.dtype))
                        .view(target.shape)
                    )
                    start += target.room
                self._matrices[n] = as_matrix(room if whole else module.place(target.name.rpartition(".")[2], room))
            if whole:
                module.place_others()
            for n, region in self._destination.fills:
                if n in staged:
                    region.of(self._matrices[n]).zero_()

    def matrix(self, target: int) -> Tensor:
        return self._matrices[target]

    def finish(self, bucket: int) -> None:
        for unit, staged in self._staged.get(bucket, {}).items():
            for n in staged:
                self.on_arrived(n, self._matrices[n], n in self._lent)
            if unit in self._destination.whole:
                targets = self._destination.targets
                self._weights.load_whole([(targets[n].name, self._matrices[n].view(targets[n].shape)) for n in staged])
            self._weights.finish(unit, self._open.pop(unit))
            for n in staged:
                del self._matrices[n]
        self._scratch = None

    def buffer_bytes(self) -> int:
        return 0 if self._scratch is None else self._scratch.nbytes


class _OpenModule:
    """A module with its parameters as its loader wants them, between its tensors' arrival and vLLM's step for it."""

    def __init__(self, module: torch.nn.Module) -> None:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
        from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

        self._module, self._info = module, get_layerwise_info(module)
        if hasattr(module, "cpu_linear"):
            drop_packed(module)
        self._info.kernel_tensors = get_layer_params_buffers(module)
        self._info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
        restore_layer_on_meta(module, self._info)

    def place(self, name: str, room: Tensor) -> Tensor:
        """Let a parameter lie in ``room``; biases are where they were (reload/meta.py, SKIP_TENSORS)."""
        meta = getattr(self._module, name)
        if not meta.is_meta:
            there: Tensor = meta.data
            return there
        parameter = room.detach()
        parameter.__class__, parameter.__dict__ = meta.__class__, meta.__dict__.copy()
        setattr(self._module, name, parameter)
        return room

    def place_others(self) -> None:
        """Tensors that are no targets."""
        from vllm.model_executor.model_loader.reload.meta import materialize_layer

        materialize_layer(self._module, self._info)

    def finish(self) -> None:
        """As reload/layerwise.py, _layerwise_process, does once a layer's tensors are loaded."""
        from vllm.model_executor.model_loader.reload.layerwise import _copy_and_restore_kernel_tensors

        module: Any = self._module
        if hasattr(module, "_already_called_process_weights_after_loading"):
            delattr(module, "_already_called_process_weights_after_loading")
        self.place_others()
        if getattr(module, "quant_method", None) is not None:
            module.quant_method.process_weights_after_loading(module)
        if hasattr(module, "update_param_tp_status"):
            module.update_param_tp_status()
        _copy_and_restore_kernel_tensors(module, self._info)
        self._info.reset()


def _is_changed_after_loading(module: torch.nn.Module) -> bool:
    """Whether vLLM holds something else of a module than what its loader fills."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    method = getattr(module, "quant_method", None)
    if not isinstance(method, QuantizeMethodBase) or isinstance(method, UnquantizedEmbeddingMethod):
        return False
    return not (use_cuda() and isinstance(method, UnquantizedLinearMethod))


def _is_plain_embedding(module: torch.nn.Module, model: torch.nn.Module) -> bool:
    """Whether no logits are made with it: neither an output layer, nor the embedding in the place of one."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    output = isinstance(module, ParallelLMHead) or getattr(model, "lm_head", None) is module
    return isinstance(module, VocabParallelEmbedding) and not output


def _require_alike(live: Tensor, target: Target) -> None:
    """What is written in place must lie as it was recorded."""
    if tuple(live.shape) != target.shape or str(live.dtype) != f"torch.{target.dtype}" or not live.is_contiguous():
        raise RunError(
            f"rollout: vLLM holds {target.name} as {list(live.shape)} of {live.dtype}, its loader fills "
            f"{list(target.shape)} of {target.dtype}"
        )
