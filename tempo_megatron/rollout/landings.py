"""Where vLLM's own loader puts which slice of which HF tensor, recorded from a twin of the model without numbers.

Loaders slice what they are given and copy the slices into slices of their parameters. On the ``meta`` device both are
shapes, offsets and strides over storages that are known, so that nothing has to be guessed from shapes. What a loader
computes instead of copying cannot be taken in parts: its module is loaded whole.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tempo_megatron.config.rollout import RolloutConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.numerics.fp8 import BLOCK, E4M3
from tempo_megatron.patching import kept, replace_function, replace_value
from tempo_megatron.reshard.fp8 import scale_name, scale_shape
from tempo_megatron.reshard.plan import Destination, Landing, Target
from tempo_megatron.reshard.regions import Mapped, Region, matrix_shape
from tempo_megatron.rollout import fp8, patches
from tempo_megatron.rollout.limits import read_hf_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Tokens of a block of the KV cache, vLLM's own number for GPUs.
KV_BLOCK = 16
#: Of a replica that nobody asks how much it can sample.
_ANY_CACHE = 1 << 30

_ATEN = torch.ops.aten
_FILLS = (_ATEN.fill_.Scalar, _ATEN.fill_.Tensor, _ATEN.zero_.default)


@contextmanager
def _apart(config: VllmConfig) -> Iterator[VllmConfig]:
    """A config for a second model in the process: attention layers register themselves by name in it.

    Rotary embeddings are one for all models of a process (model_executor/layers/rotary_embedding/__init__.py): the
    twin's, which have no numbers, must not be found by others.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding

    own = copy(config)
    own.compilation_config = copy(config.compilation_config)
    own.compilation_config.static_forward_context = {}
    own.compilation_config.static_all_moe_layers = []
    ropes = dict(rotary_embedding._ROPE_DICT)
    try:
        with set_current_vllm_config(own), _experts_known(), patches.hf_classes_left_alone():
            yield own
    finally:
        rotary_embedding._ROPE_DICT.clear()
        rotary_embedding._ROPE_DICT.update(ropes)


@contextmanager
def _experts_known() -> Iterator[None]:
    """Which experts are a rank's is read while a model is built and loaded: numbers, also on the ``meta`` device."""
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

    def with_numbers(manager: ExpertMapManager, *args: Any, **kwargs: Any) -> None:
        with torch.device("cpu"):
            original(manager, *args, **kwargs)

    parameters = tuple(inspect.signature(ExpertMapManager.__init__).parameters)
    with kept(ExpertMapManager, "__init__"):
        original = replace_function(ExpertMapManager, "__init__", with_numbers, parameters)
        yield


@contextmanager
def _without_kernels(config: VllmConfig) -> Iterator[None]:
    """FP8 layers look for a kernel when they are made, and refuse a machine that has none; a twin needs none."""
    if config.quant_config is None or config.quant_config.get_name() != "fp8":
        yield
        return
    from vllm.model_executor.layers.quantization import fp8

    parameters = "activation_quant_key weight_quant_key input_dtype out_dtype weight_shape force_kernel module_name"
    with kept(fp8, "init_fp8_linear_kernel"):
        replace_function(fp8, "init_fp8_linear_kernel", lambda **_: None, tuple(parameters.split()))
        yield


def build_twin(config: VllmConfig) -> torch.nn.Module:
    """The model as it is before weights are loaded, of this rank's tensor-parallel place, on the ``meta`` device."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    dtype = config.model_config.dtype
    with _apart(config) as own, _without_kernels(config), set_default_torch_dtype(dtype), torch.device("meta"):
        return initialize_model(own, model_config=own.model_config)


@dataclass(frozen=True)
class ForeseenRank:
    """One rank of a replica that does not exist.

    Attributes:
        destination: what it takes of the trainer's tensors.
        weights: bytes of its parameters.
        kv_tokens: what its KV cache has room for, in blocks of ``KV_BLOCK``; None where nobody asked.
    """

    destination: Destination
    weights: int
    kv_tokens: int | None


def foreseen_destinations(
    hf_dir: str | Path, tensors: Mapping[str, tuple[int, ...]], size: int, *, expert_parallel: bool, dtype: str
) -> Iterator[Destination]:
    """Of each rank of a replica of ``size`` that does not exist, one after the other; see ``foreseen_ranks``."""
    settings = RolloutConfig.model_validate(
        {"tensor_parallel_size": size, "expert_parallel": expert_parallel, "dtype": dtype}
    )
    for rank in foreseen_ranks(hf_dir, tensors, settings, None):
        yield rank.destination


def foreseen_ranks(
    hf_dir: str | Path, tensors: Mapping[str, tuple[int, ...]], settings: RolloutConfig, max_model_len: int | None
) -> Iterator[ForeseenRank]:
    """The ranks of a replica that does not exist, one after the other.

    No engine is built and no process group: twins are told their place. Only ``config.json`` is read.

    Args:
        settings: ``kv_cache_gib`` a number, where it is asked for.
        max_model_len: longest prompt + response in tokens; None: nothing is said of the KV cache.

    Raises:
        TempoError: vLLM cannot cut the model so, or its KV cache has no room for one longest sequence.
    """
    with patches.shielded_import():
        from vllm import EngineArgs

    size = settings.tensor_parallel_size
    args = EngineArgs(
        model=str(hf_dir),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=settings.dtype,
        enforce_eager=True,
        max_model_len=max_model_len or 64,
        kv_cache_memory_bytes=_ANY_CACHE if max_model_len is None else settings.kv_cache_bytes,
        block_size=KV_BLOCK,
        **fp8.overrides(settings, read_hf_config(hf_dir)),
    )
    try:
        with patches.shielded_import():
            config = args.create_engine_config()
        config.parallel_config.tensor_parallel_size = size
        config.parallel_config.enable_expert_parallel = settings.expert_parallel
        for rank in range(size):
            with _in_place_of(rank, size):
                twin = build_twin(config)
                destination = record_destination(twin, tensors, config.model_config.dtype, {})
                tokens = _kv_tokens(config, twin, settings) if max_model_len is not None else None
            yield ForeseenRank(destination, sum(p.nbytes for p in twin.parameters()), tokens)
    except (ValueError, AssertionError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise TempoError(f"vLLM cannot run {hf_dir} on {size} ranks a replica: {' '.join(lines)}") from error


def _kv_tokens(config: VllmConfig, twin: torch.nn.Module, settings: RolloutConfig) -> int:
    """By vLLM's own reckoning; TempoError where one longest sequence has no room."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    cache = config.cache_config
    if getattr(cache, "kv_cache_layout", "") is None:  # of newer ones, which an engine would choose: the order of axes
        replace_value(cache, "kv_cache_layout", "LBNHC", NoneType)
    layers = {name: m for name, m in twin.named_modules() if isinstance(m, AttentionLayerBase)}
    specs = {name: spec for name, layer in layers.items() if (spec := layer.get_kv_cache_spec(config)) is not None}
    try:
        (found,) = get_kv_cache_configs(config, [specs], [cache.kv_cache_memory_bytes])
    except ValueError as error:
        told = str(error).partition(". ")[0]
        raise TempoError(f"rollout.kv_cache_gib: {settings.kv_cache_gib}: {told}") from error
    return int(found.num_blocks) * KV_BLOCK // len(found.kv_cache_groups)


@dataclass(frozen=True)
class _Place:
    """What of a process group a model asks while it is built."""

    rank_in_group: int
    world_size: int

    def size(self) -> int:
        return self.world_size

    @property
    def device_group(self) -> _Place:
        return self

    @property
    def rank(self) -> int:
        return self.rank_in_group

    @property
    def ranks(self) -> list[int]:
        return list(range(self.world_size))

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1


@contextmanager
def _in_place_of(rank: int, size: int) -> Iterator[None]:
    """vLLM's groups (distributed/parallel_state.py) are those of this rank of one replica, which is all the world."""
    from vllm.distributed import parallel_state

    alone, one = _Place(0, 1), _Place(rank, size)
    places = {"_TP": one, "_EP": one, "_WORLD": one} | dict.fromkeys(("_PP", "_DP", "_PCP", "_DCP"), alone)
    with ExitStack() as stack:
        for name, place in places.items():
            stack.enter_context(kept(parallel_state, name))
            replace_value(parallel_state, name, place, object)
        yield


def record_destination(
    twin: torch.nn.Module, tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype, units: Mapping[str, str]
) -> Destination:
    """Load the twin and see what goes where.

    Tensors that the twin holds in FP8 come quantised by blocks, float8_e4m3fn, each with its scales behind it, float32
    (``reshard.fp8``); the destination takes both.

    Args:
        twin: from ``build_twin``.
        tensors: names and shapes of all HF tensors of the model, without scales, in an order that its loader takes.
        dtype: that the others come in.
        units: parameter name -> module, of those that are finished as a whole after loading.

    Raises:
        TempoError: the twin holds FP8 otherwise than by blocks of 128.
    """
    recorder = _loaded(twin, {name: _meta(shape, dtype) for name, shape in tensors.items()})
    quantised = recorder.quantised()
    if quantised:
        _require_blocks(twin)
        metas = {}
        for name, shape in tensors.items():
            metas[name] = _meta(shape, E4M3 if name in quantised else dtype)
            if name in quantised:
                metas[scale_name(name)] = _meta(scale_shape(shape), torch.float32)
        recorder = _loaded(twin, metas)
    return recorder.destination(units)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _loaded(twin: torch.nn.Module, metas: Mapping[str, Tensor]) -> _Recorder:
    parameters = {name: p.data for name, p in twin.named_parameters()}  # a tied one once
    recorder = _Recorder(metas, parameters)
    with torch.no_grad(), recorder:
        twin.load_weights(iter(metas.items()))  # type: ignore[operator]
    return recorder


def _require_blocks(twin: torch.nn.Module) -> None:
    """TempoError unless the blocks of all layers in FP8 are those of ``reshard.fp8``."""
    for name, module in twin.named_modules():
        if any(p.dtype == E4M3 for p in module.parameters(recurse=False)):
            size = getattr(module, "weight_block_size", None)
            if size is None or list(size) != [BLOCK, BLOCK]:
                raise TempoError(f"{name} of the rollout engine is in FP8 with blocks of {size}, not {[BLOCK, BLOCK]}")


@dataclass
class _Known:
    """A storage that is a tensor's: its name and the columns of its matrix."""

    name: str
    columns: int


class _Recorder(TorchDispatchMode):
    """Notes every copy into a parameter and does none."""

    def __init__(self, metas: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._metas, self._parameters = metas, parameters
        self._sources = {_storage(t): _Known(name, matrix_shape(t.shape)[1]) for name, t in metas.items()}
        self._targets = {_storage(t): _Known(name, matrix_shape(t.shape)[1]) for name, t in parameters.items()}
        self._made_of: dict[int, set[str]] = {_storage(t): {name} for name, t in metas.items()}
        self._kept: list[Tensor] = []  # storages are known by address: none may be used anew
        self._landings: list[tuple[str, str, Mapped]] = []
        self._fills: list[tuple[str, Region]] = []
        self._computed: defaultdict[str, set[str]] = defaultdict(set)  # parameters that get more than copies, of what

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap each operation for the case that it is compiled, at twice the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:  # of the same storage, which tells what it is of
            return func(*args, **(kwargs or {}))
        if func is _ATEN.copy_.default or func in _FILLS:
            into = self._targets.get(_storage(args[0]))
            if into is not None:
                if func in _FILLS:
                    self._filled(into, args[0])
                else:
                    self._copied(into, args[0], args[1])
                return args[0]
        result = func(*args, **(kwargs or {}))
        made_of = self._origin(args) | self._origin((kwargs or {}).values())
        if not made_of and not func._schema.is_mutable:
            return result
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        ]
        for value in written:
            if (target := self._targets.get(_storage(value))) is not None:
                self._computed[target.name] |= made_of
        for value in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            if made_of and _storage(value) not in self._sources and _storage(value) not in self._targets:
                self._made_of.setdefault(_storage(value), set()).update(made_of)
                self._kept.append(value)
        return result

    def _origin(self, values: Iterable[Any]) -> set[str]:
        """The HF tensors that arguments were made of."""
        found: set[str] = set()
        for value in values:
            if isinstance(value, Tensor):
                found |= self._made_of.get(_storage(value), set())
            elif isinstance(value, (list, tuple)):
                found |= self._origin(value)
        return found

    def _copied(self, into: _Known, to: Tensor, of: Tensor) -> None:
        source = self._sources.get(_storage(of))
        if to.shape != of.shape:
            of = of.expand_as(to)
        read = region_of(of, source.columns) if source is not None else None
        lands = region_of(to, into.columns)
        if to.numel() == 0:
            return
        if source is None or read is None or lands is None or (read.rows, read.cols) != (lands.rows, lands.cols):
            self._computed[into.name] |= self._made_of.get(_storage(of), set())
        else:
            self._landings.append((into.name, source.name, Mapped(read, lands.row, lands.col)))

    def _filled(self, into: _Known, to: Tensor) -> None:
        if to.numel() == 0:
            return
        region = region_of(to, into.columns)
        if region is None:
            self._computed[into.name] |= set()
        else:
            self._fills.append((into.name, region))

    def quantised(self) -> set[str]:
        """The HF tensors that parameters in FP8 get."""
        into = {name for name, parameter in self._parameters.items() if parameter.dtype == E4M3}
        copied = {tensor for name, tensor, _ in self._landings if name in into}
        return copied.union(*(made_of for name, made_of in self._computed.items() if name in into))

    def destination(self, units: Mapping[str, str]) -> Destination:
        """Targets in the order in which they were loaded; of modules that come whole the tensors themselves."""
        modules = {name: units.get(name, name.rpartition(".")[0]) for name in self._parameters}
        whole = {modules[name] for name in self._computed}
        taken = _Taken()
        for name, tensor, mapped in self._landings:
            if modules[name] not in whole:
                taken.land(_target(name, self._parameters[name], units.get(name)), tensor, mapped)
            else:
                self._computed[name].add(tensor)
        for name, region in self._fills:
            if modules[name] not in whole:
                taken.fill(_target(name, self._parameters[name], units.get(name)), region)
        for name, tensors in self._computed.items():
            for tensor in sorted(tensors):
                meta = self._metas[tensor]
                everything = Mapped(Region(0, 0, *matrix_shape(meta.shape)), 0, 0)
                taken.land(_target(tensor, meta, modules[name]), tensor, everything)
        return taken.destination(tuple(sorted(whole)))


class _Taken:
    """Targets by (name, unit), with what lands in them; a rectangle that is loaded twice lands once."""

    def __init__(self) -> None:
        self._index: dict[Target, int] = {}
        self._landings: dict[Landing, None] = {}
        self._fills: dict[tuple[int, Region], None] = {}

    def land(self, target: Target, tensor: str, mapped: Mapped) -> None:
        self._landings[Landing(self._number(target), tensor, mapped)] = None

    def fill(self, target: Target, region: Region) -> None:
        self._fills[self._number(target), region] = None

    def _number(self, target: Target) -> int:
        return self._index.setdefault(target, len(self._index))

    def destination(self, whole: tuple[str, ...]) -> Destination:
        return Destination(tuple(self._index), tuple(self._landings), tuple(self._fills), whole)


def _target(name: str, tensor: Tensor, unit: str | None) -> Target:
    kind = str(tensor.dtype).removeprefix("torch.")
    return Target(name, tuple(tensor.shape), kind, tensor.element_size(), unit)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def region_of(view: Tensor, columns: int) -> Region | None:
    """The rectangle that a view covers, row by row, of a contiguous matrix of ``columns`` columns; None if none."""
    row, col = divmod(int(view.storage_offset()), columns)
    dims: list[tuple[int, int]] = []  # (size, stride), dimensions that follow each other without a gap as one
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = dims[-1][0] * size, stride
        else:
            dims.append((size, stride))
    match dims:
        case []:
            return Region(row, col, 1, 1)
        case [(size, 1)] if col == 0 and size % columns == 0:
            return Region(row, 0, size // columns, columns)
        case [(size, 1)] if col + size <= columns:
            return Region(row, col, 1, size)
        case [(rows, stride)] if stride == columns:
            return Region(row, col, rows, 1)
        case [(rows, stride), (size, 1)] if stride == columns and col + size <= columns:
            return Region(row, col, rows, size)
    return None
