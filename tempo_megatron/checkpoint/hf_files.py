"""HF folders in and out: safetensors shards with an index, config and tokenizer carried along."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from tempo_megatron.errors import TempoError

#: Files of an HF folder that are not weights and travel with a model.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def load_hf_config(folder: Path) -> PretrainedConfig:
    """config.json of an HF folder; TempoError naming the file if it is missing or not a model config."""
    path = folder / "config.json"
    if not path.is_file():
        raise TempoError(f"{path}: missing; an HF model folder has a config.json")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise TempoError(
            f"{path}: not a config that transformers knows: {' '.join(str(error).split())[:200]}"
        ) from error


class HFTensors:
    """Reads tensors by name from the safetensors files of an HF folder, one at a time.

    Raises TempoError naming the file and the tensor when something is missing, truncated or corrupt.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        for path in self._shards():
            try:
                with safe_open(path, framework="pt") as f:
                    self._files.update(dict.fromkeys(f.keys(), path))
            except (SafetensorError, OSError) as error:
                raise TempoError(f"{path}: not a readable safetensors file ({error})") from error

    def _shards(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise TempoError(f"{index}: not a safetensors index with a weight_map") from error
            missing = [n for n in names if not (self.folder / n).is_file()]
            if missing:
                raise TempoError(f"{self.folder / missing[0]}: missing; {index.name} names it")
            return [self.folder / n for n in names]
        shards = sorted(self.folder.glob("*.safetensors"))
        if not shards:
            raise TempoError(f"{self.folder}: no *.safetensors file in it")
        return shards

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def __call__(self, name: str) -> Tensor:
        if name not in self._files:
            raise TempoError(f"{self.folder}: tensor {name} is missing")
        try:
            with safe_open(self._files[name], framework="pt") as f:
                return f.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise TempoError(f"{self._files[name]}: tensor {name} cannot be read ({error})") from error


def copy_side_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and generation config (whichever exist) from one HF folder to another."""
    target.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


class HFWriter:
    """Writes a stream of tensors as sharded safetensors; the folder appears complete or not at all."""

    def __init__(self, folder: Path, shard_bytes: int = 5 << 30) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.partial = folder.with_name(f".{folder.name}.partial")

    def write(self, tensors: Iterable[tuple[str, Tensor]], side_files: Path, config: dict | None = None) -> None:
        """Write everything, then rename into place. ``config`` replaces keys of the copied config.json."""
        shutil.rmtree(self.partial, ignore_errors=True)
        copy_side_files(side_files, self.partial)
        if config:
            path = self.partial / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}, indent=2) + "\n")
        shards: list[list[str]] = []
        pending: dict[str, Tensor] = {}
        size = total = 0

        def flush() -> None:
            nonlocal pending, size
            if pending:
                save_file(pending, self.partial / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
                shards.append(list(pending))
                pending, size = {}, 0

        for name, tensor in tensors:
            tensor = tensor.detach().to("cpu", copy=True).contiguous()
            if pending and size + tensor.nbytes > self.shard_bytes:
                flush()
            pending[name] = tensor
            size += tensor.nbytes
            total += tensor.nbytes
        flush()
        self._name_shards(shards, total)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self.partial, self.folder)

    def _name_shards(self, shards: list[list[str]], total: int) -> None:
        """transformers' names: model.safetensors, or model-0000i-of-0000n with an index."""
        if len(shards) == 1:
            os.replace(self.partial / "shard-0.safetensors", self.partial / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            os.replace(self.partial / f"shard-{i}.safetensors", self.partial / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
