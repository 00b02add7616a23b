"""Write HF folders: a stream of tensors as sharded safetensors, with config and tokenizer of another folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tempo_megatron.checkpoint.safetensors_stream import SafetensorsWriter
from tempo_megatron.cluster.pulse import ping

CONFIG = "config.json"
#: Name of a config.json that is not complete.
UNNAMED = ".config.json.partial"

#: What an HF folder holds beside weights, and what travels with a model: files, and one folder of them.
SIDE_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and generation config (whichever exist) from one HF folder to another."""
    target.mkdir(parents=True, exist_ok=True)
    _copy(source, target, SIDE_FILES)


def _copy(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
        elif (source / name).is_dir():
            shutil.copytree(source / name, target / name, copy_function=shutil.copyfile, dirs_exist_ok=True)


class HFWriter:
    """Writes a stream of tensors as an HF folder that appears complete or not at all.

    Everything is written and synced in ``.NAME.partial`` beside the folder: shards under names that no reader knows,
    then their final names, the index and the side files, config.json last, so that nothing can load it before it is
    whole. It then takes the folder's place; an older folder is moved to ``.NAME.replaced`` first and removed at the
    end. A process that is killed between those two moves leaves both whole under their hidden names, and the next
    writer of the folder moves the older one back.

    Memory: the stream's current tensor.

    Args:
        shard_bytes: largest shard; a single larger tensor is a shard of its own.
    """

    def __init__(self, folder: Path, shard_bytes: int = 5 << 30) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.partial = folder.with_name(f".{folder.name}.partial")
        self.replaced = folder.with_name(f".{folder.name}.replaced")

    def write(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        side_files: Path,
        config: Mapping[str, Any] | None = None,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        """Write the folder.

        Args:
            tensors: (name, tensor of any device); a tensor is copied, so that its memory may be used again.
            side_files: HF folder whose config, tokenizer and generation config are copied, byte for byte.
            config: keys of config.json to replace or add (None: remove), looked at after the last tensor. A config
                that has these values already is copied byte for byte.
            check: looks at the hidden folder when all but config.json is in it, and raises to have it removed.

        Raises:
            OSError: a full disk, a file in the way. The folder is as it was before.
        """
        if self.replaced.exists() and not self.folder.exists():  # a writer was killed between its two moves
            os.replace(self.replaced, self.folder)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        try:
            self._name_shards(*self._write_shards(tensors))
            _copy(side_files, self.partial, (name for name in SIDE_FILES if name != CONFIG))
            for path in self.partial.rglob("*"):
                sync(path)
            if check is not None:
                check(self.partial)
            self.partial.joinpath(UNNAMED).write_bytes(changed_config(side_files / CONFIG, config or {}))
            sync(self.partial / UNNAMED)
            os.replace(self.partial / UNNAMED, self.partial / CONFIG)
            sync(self.partial)
            self._take_place()
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _write_shards(self, tensors: Iterable[tuple[str, Tensor]]) -> tuple[list[list[str]], dict[str, int]]:
        """Write ``shard-0``, ``shard-1``, ...; returns the tensor names of each, and the index's metadata."""
        shards: list[SafetensorsWriter] = []
        parameters = 0
        for name, tensor in tensors:
            last = shards[-1] if shards else None
            if last is None or last.data_bytes + tensor.nbytes > self.shard_bytes or not last.fits(name, tensor):
                if last is not None:
                    last.close()
                shards.append(SafetensorsWriter(self.partial / f"shard-{len(shards)}"))
            shards[-1].add(name, tensor.cpu())
            parameters += tensor.numel()
            ping()
            del tensor  # the stream makes its next one now
        shards[-1].close()
        metadata = {"total_parameters": parameters, "total_size": sum(shard.data_bytes for shard in shards)}
        return [shard.names for shard in shards], metadata

    def _name_shards(self, shards: list[list[str]], metadata: dict[str, int]) -> None:
        """transformers' names: model.safetensors, or model-0000i-of-0000n with an index."""
        if len(shards) == 1:
            os.replace(self.partial / "shard-0", self.partial / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            os.replace(self.partial / f"shard-{i}", self.partial / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": metadata, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.partial / "model.safetensors.index.json").write_text(text, "utf-8")

    def _take_place(self) -> None:
        shutil.rmtree(self.replaced, ignore_errors=True)
        if self.folder.exists():
            os.replace(self.folder, self.replaced)
        try:
            os.replace(self.partial, self.folder)
        except OSError:
            if self.replaced.exists():
                os.replace(self.replaced, self.folder)
            raise
        sync(self.folder.parent)
        shutil.rmtree(self.replaced, ignore_errors=True)


def changed_config(path: Path, changes: Mapping[str, Any]) -> bytes:
    """config.json with ``changes`` (None: the key goes); the very bytes where it has these values already."""
    raw = path.read_bytes()
    config: dict[str, Any] = json.loads(raw)
    if all(config.get(key) == value for key, value in changes.items()):
        return raw
    kept = {key: value for key, value in {**config, **changes}.items() if value is not None or key not in changes}
    return (json.dumps(kept, indent=2) + "\n").encode()


def dtype_change(folder: Path, dtype: str) -> dict[str, Any]:
    """The change of config.json for weights of ``dtype`` ("bfloat16"), under the key that this file uses."""
    config = json.loads((folder / CONFIG).read_bytes())
    return dict.fromkeys([key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"], dtype)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's names, outlive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
