"""Checkpoint in Megatron's format -> HF tensors, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from tempo_megatron.checkpoint.convert.distcp import DistCheckpointReader
from tempo_megatron.checkpoint.convert.plan import Part, simulated_rank
from tempo_megatron.checkpoint.convert.to_megatron import OnBytes, config_dtype
from tempo_megatron.checkpoint.critic_format import HeadFormat, critic_folder
from tempo_megatron.checkpoint.hf_write import HFWriter
from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.model.build import model_dims
from tempo_megatron.model.hf_tensors import Role


class MegatronSource:
    """The weights of one role of a checkpoint, whatever layout wrote them, as a stream of HF tensors.

    Raises TempoError naming the folder and the tensor when one is missing, misshapen or damaged.

    Args:
        folder: Megatron's distributed checkpoint (``CHECKPOINT/actor`` or ``CHECKPOINT/critic``).
        dtype: what every tensor becomes; None keeps what is stored.
    """

    def __init__(self, folder: Path, config: PretrainedConfig, role: Role, dtype: torch.dtype | None) -> None:
        self.folder, self.config, self.role, self.dtype = folder, config, role, dtype
        self._reader = DistCheckpointReader(folder)
        with simulated_rank(config, role, ParallelConfig(), 0) as plan:
            self._parts: list[Part] = plan.parts
        left = self._reader.weights - {p.key for p in self._parts}
        if left:
            raise TempoError(f"{folder}: tensor {min(left)} has no place in {'an' if role == 'actor' else 'a'} {role}")
        self._stored = {p.key: self._reader.dtype_of(piece) for p in self._parts for piece in p.pieces(p.meta)}

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the HF tensors."""
        return {self.dtype} if self.dtype else set(self._stored.values())

    def total_bytes(self) -> int:
        return sum(p.meta.numel() * (self.dtype or self._stored[p.key]).itemsize for p in self._parts)

    def parameters(self) -> Iterator[tuple[Part, Tensor]]:
        """Every parameter of a model that no layout divides, in weight-map order."""
        for part in self._parts:
            pieces = part.pieces(torch.empty(part.meta.shape, dtype=self._stored[part.key]))
            self._reader.read(pieces)
            value = part.merge(pieces)
            yield part, value.to(self.dtype or value.dtype)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        dims = model_dims(self.config)
        for part, value in self.parameters():
            tensors = part.entry.rule.transform.unshard([value], dims)
            yield from zip(part.hf_names, tensors, strict=True)


def write_hf(
    source: MegatronSource,
    target: Path,
    hf_dir: Path,
    shard_bytes: int,
    on_bytes: OnBytes,
    check: Callable[[Path], None],
    head_format: HeadFormat | None = None,
) -> None:
    """Write the HF folder ``target``; it appears when ``check`` has seen all of it but config.json.

    Args:
        hf_dir: folder with config.json, tokenizer and generation config (and a critic's carried output layer).
        head_format: of a critic, see ``critic_format``.
    """

    def counted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in source:
            yield name, tensor
            on_bytes(tensor.nbytes)

    changes = config_dtype(hf_dir, source.dtypes)
    tensors: Iterator[tuple[str, Tensor]] = counted()
    if source.role == "critic":
        # its changes are complete only when the tensors have been taken, and the writer looks at them after that
        tensors, critic_changes = critic_folder(tensors, source.config, hf_dir, head_format)
        critic_changes |= changes
        changes = critic_changes
    HFWriter(target, shard_bytes).write(tensors, hf_dir, changes, check)
