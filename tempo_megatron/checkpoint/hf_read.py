"""Read HF folders: the config, and tensors by name out of safetensors shards.

All headers are read and checked when a folder is opened, so that a fault is told before the long part begins: in one
line that names the file and, where there is one, the tensor.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from tempo_megatron.cluster.pulse import ping
from tempo_megatron.data.tokenizer import check_token_ids, read_object
from tempo_megatron.errors import TempoError
from tempo_megatron.lfs import refuse_lfs_pointer
from tempo_megatron.locate import no_weights_reason
from tempo_megatron.model.families import family_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

#: safetensors' names of the dtypes that weights may have.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

#: What transformers raises over values of a config.json that it does not expect (an unknown dtype, labels as text).
NOT_A_CONFIG = (
    ValueError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    StrictDataclassError,
)


def load_hf_config(folder: Path) -> PretrainedConfig:
    """config.json of an HF folder.

    Raises:
        TempoError: naming the file, if it is missing, is no model config, or is one of a model that is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise TempoError(f"{path}: missing; an HF model folder has a config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except NOT_A_CONFIG as error:
        raise TempoError(f"{path}: not a config that transformers knows: {_one_line(error)[:200]}") from error
    try:
        family_of(config)
    except TempoError as error:
        raise TempoError(f"{path}: {error}") from None
    check_token_ids(path, read_object(path), config.vocab_size)
    return config


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of a tensor.

    Attributes:
        file: the shard.
        key: its name in the shard.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.key}"

    def read(self) -> Tensor:
        """The tensor, mapped from the file; TempoError if it cannot be read."""
        try:
            with safe_open(self.file, framework="pt") as f:
                return f.get_tensor(self.key)
        except (SafetensorError, OSError) as error:
            raise TempoError(f"{self} cannot be read ({_one_line(error)})") from error


class HFTensors:
    """Reads tensors by name from the safetensors files of an HF folder, one at a time.

    A file is opened for each tensor that is read: the mapped pages of a file that stays open count as this process's
    memory, and after the last shard the whole model would.

    Args:
        folder: with ``model.safetensors``, or an index and its shards, or shards alone (``*.safetensors``).
        besides: files of the folder that no index names and that are read too, where they exist.

    Raises:
        TempoError: naming the file and the tensor, when the folder has no safetensors or is an adapter, a shard is
            missing, truncated or corrupt, a dtype is not float32, bfloat16 or float16, or index and shards disagree.
    """

    def __init__(self, folder: Path, besides: Iterable[str] = ()) -> None:
        self.folder = folder
        if (folder / ADAPTER).is_file():
            raise TempoError(f"{folder / ADAPTER}: an adapter is not read; merge it into its base model and save that")
        self._index = _read_index(folder)
        self._stored: dict[str, StoredTensor] = {}
        for path in self._shards():
            self._add(path)
        if self._index is not None:
            self._compare_with_index(self._index)
        for path in (folder / name for name in besides):
            if path.is_file():
                self._add(path)

    def _shards(self) -> list[Path]:
        if self._index is not None:
            return [self.folder / name for name in sorted(set(self._index.values()))]
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        shards = sorted(self.folder.glob("*.safetensors"))
        if not shards:
            raise TempoError(f"{self.folder}: {no_weights_reason(self.folder)}")
        return shards

    def _add(self, path: Path) -> None:
        for tensor in read_header(path):
            if tensor.key in self._stored:
                raise TempoError(f"{tensor} is also in {self._stored[tensor.key].file.name}; one must go")
            self._stored[tensor.key] = tensor

    def _compare_with_index(self, index: dict[str, str]) -> None:
        for name, file in index.items():
            if name not in self._stored or self._stored[name].file.name != file:
                raise TempoError(f"{self.folder / file}: tensor {name} is missing; {INDEX} says that it is here")
        for name, stored in self._stored.items():
            if name not in index:
                raise TempoError(f"{stored} is not named in {INDEX}")

    @property
    def listing(self) -> Path:
        """The file that lists what the folder holds: the index or the only shard (the folder, if neither is there)."""
        candidates = (self.folder / INDEX, self.folder / WEIGHTS)
        return next((path for path in candidates if path.is_file()), self.folder)

    @property
    def names(self) -> set[str]:
        return set(self._stored)

    def _of(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise TempoError(f"{self.listing}: tensor {name} is missing")
        return self._stored[name]

    def file_of(self, name: str) -> Path:
        return self._of(name).file

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape

    def dtype_of(self, name: str) -> torch.dtype:
        return self._of(name).dtype

    def describe(self, name: str) -> str:
        """File and tensor as the file names it, for messages."""
        return str(self._of(name))

    def __call__(self, name: str) -> Tensor:
        ping()
        return self._of(name).read()


def read_header(path: Path) -> list[StoredTensor]:
    """Every tensor of one safetensors file, without its data; TempoError if a file or a dtype cannot be used."""
    refuse_lfs_pointer(path)
    try:
        with safe_open(path, framework="pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118  (safe_open is no mapping)
            found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise TempoError(f"{path}: not a readable safetensors file ({_fault(path) or _one_line(error)})") from error
    for name, (_, dtype) in found.items():
        if dtype not in DTYPES:
            raise TempoError(
                f"{path}: tensor {name} has the dtype {dtype}; weights must be {', '.join(DTYPES)} "
                "(a quantized model has to be saved unquantized first)"
            )
    return [StoredTensor(path, name, shape, DTYPES[dtype]) for name, (shape, dtype) in found.items()]


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard file, or None without an index."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text("utf-8"))["weight_map"]
        named = sorted(set(index.values()))
        if not all(Path(name).name == name for name in named):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # ValueError: not JSON, not UTF-8
        raise TempoError(
            f"{path}: not a safetensors index: its weight_map must give a file of this folder for each tensor"
        ) from error
    if (folder / WEIGHTS).is_file() and WEIGHTS not in named:
        raise TempoError(f"{path}: {WEIGHTS} is there too, so that the weights are there twice; one must go")
    for name in named:
        if not (folder / name).is_file():
            tensor = min(t for t, file in index.items() if file == name)
            raise TempoError(f"{folder / name}: missing; {INDEX} says that tensor {tensor} is in it")
    return dict(index)


def _fault(path: Path) -> str | None:
    """What is wrong with a truncated file, whose header tells how long it was: the first tensor that is cut off."""
    try:
        with path.open("rb") as f:
            size = path.stat().st_size
            length = struct.unpack("<Q", f.read(8))[0]
            if 8 + length > size:
                return f"its header takes {length} bytes, the file has {size}"
            header = json.loads(f.read(length))
            ends = {n: 8 + length + int(t["data_offsets"][1]) for n, t in header.items() if n != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    cut = [name for name in sorted(ends, key=ends.__getitem__) if ends[name] > size]
    return f"truncated: tensor {cut[0]} ends at byte {ends[cut[0]]}, the file at {size}" if cut else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
