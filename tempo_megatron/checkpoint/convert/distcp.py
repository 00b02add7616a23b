"""Megatron distributed checkpoints (``torch_dist``) read and written piece by piece, by one process.

Megatron's own save and load hold all of a rank's tensors at once and need the ranks to meet.  Here the same files
are written with the same writer and read with the same reader, but a tensor exists only while it is copied.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from tempo_megatron.checkpoint.faults import UNREADABLE, one_line
from tempo_megatron.checkpoint.inprocess_writer import WrittenShard, write_bucket
from tempo_megatron.errors import TempoError
from tempo_megatron.model.fp8 import is_state


def _chunk(piece: ShardedTensor) -> ChunkStorageMetadata:
    sizes = torch.Size((1,) * piece.prepend_axis_num + tuple(piece.local_shape))
    return ChunkStorageMetadata(offsets=torch.Size(piece.global_offset), sizes=sizes)


class DistCheckpointWriter:
    """Writes the files of every rank, one rank after the other, then the metadata that makes them a checkpoint.

    Attributes:
        shards: what was written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._writer = FileSystemWriterAsync(folder)
        self._folder = folder
        self._plans: list[SavePlan] = []
        self.shards: list[WrittenShard] = []

    def write_rank(self, pieces: Iterable[ShardedTensor], objects: Iterable[ShardedObject]) -> None:
        """Write the next rank's file; ``pieces`` are asked for one at a time and hold CPU data."""
        items: list[WriteItem] = []

        def tensors() -> Iterator[tuple[WriteItem, Tensor]]:
            for piece in pieces:
                chunk = _chunk(piece)
                data = piece.data.contiguous()
                if data.untyped_storage().nbytes() != data.nbytes:
                    data = data.clone()  # torch.save writes the whole storage that a view is part of
                item = WriteItem(
                    index=MetadataIndex(piece.key, chunk.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=chunk,
                        properties=TensorProperties.create_from_tensor(data),
                        size=torch.Size(piece.global_shape),
                    ),
                )
                items.append(item)
                yield item, data.view(chunk.sizes)

        def values() -> Iterator[tuple[WriteItem, io.BytesIO]]:
            for value in objects:
                packed = io.BytesIO()
                torch.save([value.data], packed)
                items.append(WriteItem(index=MetadataIndex(value.unique_key), type=WriteItemType.BYTE_IO))
                yield items[-1], packed

        name = f"__{len(self._plans)}_0.distcp"
        bucket = (str(self._folder / name), name, (values(), tensors()))
        self.shards.append(write_bucket(self._writer.transforms, bucket))
        self._plans.append(SavePlan(items=items))

    def finish(self, content_metadata: dict[str, Any]) -> None:
        """Write the metadata. Raises ValueError if the pieces of some tensor overlap or leave gaps."""
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        _, metadata = planner.create_global_plan(self._plans)
        self._writer.finish(metadata, [shard.results for shard in self.shards])
        torch.save({"content_metadata": content_metadata}, self._folder / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))


class _Into(DefaultLoadPlanner):
    """A planner whose targets are given tensors, by key and offset."""

    def __init__(self, targets: dict[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._targets = targets

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._targets[index]


class DistCheckpointReader:
    """Reads pieces of the tensors of one distributed checkpoint, whatever layout wrote them.

    Raises TempoError naming the folder and the tensor for what is missing, misshapen or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with self._one_line():
            self._reader = FileSystemReader(folder)
            self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def _one_line(self) -> Any:
        return one_line(TempoError, f"{self._folder}: {UNREADABLE}")

    @property
    def weights(self) -> set[str]:
        """Keys of the model's tensors (the optimizer's begin with ``optimizer.``), without FP8's scales."""
        tensors = {k for k, v in self._metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        return {k for k in tensors if not k.startswith("optimizer.") and not is_state(k)}

    def dtype_of(self, piece: ShardedTensor) -> torch.dtype:
        """The dtype that is stored; checks that the tensor is there and has the shape that the piece is part of."""
        found = self._metadata.state_dict_metadata.get(piece.key)
        if not isinstance(found, TensorStorageMetadata):
            raise TempoError(f"{self._folder}: tensor {piece.key} is missing")
        wanted, stored = list(piece.global_shape), list(found.size)
        if piece.allow_shape_mismatch and stored[1:] == wanted[1:] and stored[0] >= wanted[0]:
            stored = wanted  # rows that pad the vocabulary depend on the layout
        if stored != wanted:
            raise TempoError(
                f"{self._folder}: tensor {piece.key} has the shape {list(found.size)}, config.json asks for {wanted}"
            )
        return found.properties.dtype

    def read(self, pieces: Iterable[ShardedTensor]) -> None:
        """Fill the pieces' data (CPU), converting to its dtype."""
        targets: dict[MetadataIndex, Tensor] = {}
        items: list[ReadItem] = []
        for piece in pieces:
            chunk = _chunk(piece)
            targets[MetadataIndex(piece.key, chunk.offsets)] = piece.data.view(chunk.sizes)
            stored = self._metadata.state_dict_metadata[piece.key]
            assert isinstance(stored, TensorStorageMetadata)
            found = create_read_items_for_chunk_list(piece.key, stored, [chunk])
            if sum(math.prod(item.lengths) for item in found) != piece.data.numel():
                raise TempoError(f"{self._folder}: tensor {piece.key} is incomplete at {list(chunk.offsets)}")
            items += found
        with self._one_line():
            self._reader.read_data(LoadPlan(items), _Into(targets)).wait()
