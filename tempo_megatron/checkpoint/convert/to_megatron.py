"""HF folder -> weights-only checkpoint in Megatron's format, streamed.

Every rank's file is written in turn; of the model there is never more in memory than the HF tensors of one
parameter and that parameter's part on one rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from transformers import PretrainedConfig

from tempo_megatron import __version__
from tempo_megatron.checkpoint.convert.distcp import DistCheckpointWriter
from tempo_megatron.checkpoint.convert.plan import Part, RankPlan, simulated_rank, world_size_of
from tempo_megatron.checkpoint.critic_format import WEIGHT, CriticTensors, carry_lm_head, open_hf_folder
from tempo_megatron.checkpoint.digests import FileDigest
from tempo_megatron.checkpoint.hf_check import check_hf_folder
from tempo_megatron.checkpoint.hf_write import CONFIG, changed_config, copy_side_files, dtype_change
from tempo_megatron.checkpoint.manifest import Manifest, digest_folder, write_manifest
from tempo_megatron.config.architectures import TEXT_CLASSIFIER
from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import hf_name
from tempo_megatron.model.families.base import VALUE_HEAD_RULES
from tempo_megatron.model.hf_tensors import Role, expected_tensors
from tempo_megatron.model.weights import entry_shard

#: called with the bytes that were written since the last call
OnBytes = Callable[[int], object]


class HFSource:
    """An HF folder that was found to hold exactly the tensors of a role, in the right shapes; read by name.

    Only headers are read here.

    Args:
        init_head: take a policy as a critic; its value head is made anew.
        dtype: what every tensor becomes; None keeps each tensor's own.

    Attributes:
        fresh_head: the value head is made anew.
        head_format: the form in which a critic is written back, see ``critic_format``; None for the usual one.
        names: the tensors that are converted.
        dtypes: of each Megatron tensor in the checkpoint, by key.

    Raises:
        TempoError: naming the file and the tensor.
    """

    def __init__(
        self, folder: Path, config: PretrainedConfig, role: Role, *, init_head: bool, dtype: torch.dtype | None
    ) -> None:
        self.folder, self.config, self.role, self.dtype = folder, config, role, dtype
        self.tensors = open_hf_folder(folder, role)
        if role == "actor" and WEIGHT in self.tensors.names:
            raise TempoError(f"{self.tensors.describe(WEIGHT)} is a value head: convert a critic with --critic")
        if role == "critic" and WEIGHT not in self.tensors.names and not init_head:
            raise TempoError(f"{folder} has no value head ({WEIGHT}); --init-head makes a fresh one")
        self.fresh_head = check_hf_folder(self.tensors, config, role, init_head=init_head)
        self.head_format = self.tensors.head_format if isinstance(self.tensors, CriticTensors) else None
        if any(name.endswith(TEXT_CLASSIFIER) for name in config.architectures):
            self.head_format = None
        self.names = sorted(self.tensors.names & expected_tensors(config, role).keys())
        self.dtypes = self._megatron_dtypes()

    def _megatron_dtypes(self) -> dict[str, torch.dtype]:
        """Refuses HF tensors that would share a Megatron tensor (one for all layers) and differ in dtype."""
        first: dict[str, str] = {}
        dtypes: dict[str, torch.dtype] = {}
        with simulated_rank(self.config, self.role, ParallelConfig(), 0) as plan:
            for part in plan.parts:
                if self.is_fresh(part):
                    dtypes[part.key] = self.dtype or part.meta.dtype
                    continue
                for name in part.hf_names:
                    dtype = self.dtype or self.tensors.dtype_of(name)
                    if dtypes.setdefault(part.key, dtype) != dtype:
                        raise TempoError(
                            f"{self.tensors.describe(name)} is {_short(dtype)}, but {first[part.key]} is "
                            f"{_short(dtypes[part.key])}; Megatron keeps both in one tensor: choose one with --dtype"
                        )
                    first.setdefault(part.key, name)
        return dtypes

    def is_fresh(self, part: Part) -> bool:
        return self.fresh_head and part.entry.rule in VALUE_HEAD_RULES

    def read(self, name: str) -> Tensor:
        """A tensor as the conversion must keep it."""
        tensor = self.tensors(name)
        return tensor.to(self.dtype or tensor.dtype)

    def total_bytes(self) -> int:
        """Bytes that a conversion writes, padding left out."""
        return sum(
            math.prod(self.tensors.shape_of(name)) * (self.dtype or self.tensors.dtype_of(name)).itemsize
            for name in self.names
        )


def write_checkpoint(
    source: HFSource, folder: Path, layout: ParallelConfig, head_bias: float, on_bytes: OnBytes
) -> dict[str, FileDigest]:
    """Write the weights into ``folder/ROLE`` and the side files beside it, but no manifest yet.

    Returns:
        digests of the shards, by their path in the folder.
    """
    writer = DistCheckpointWriter(folder / source.role)
    for rank in range(world_size_of(layout)):
        with simulated_rank(source.config, source.role, layout, rank) as plan:
            writer.write_rank(_pieces(source, plan, head_bias, on_bytes), plan.objects)
    writer.finish({"chained_optim_avoid_prefix": True, "singleton_local_shards": False})
    side_files = folder / hf_name(source.role)
    copy_side_files(source.folder, side_files)
    config = changed_config(source.folder / CONFIG, config_dtype(source.folder, set(source.dtypes.values())))
    (side_files / CONFIG).write_bytes(config)
    if source.role == "critic":
        carry_lm_head(source.folder, side_files)
    return {shard.path.relative_to(folder).as_posix(): shard.digest for shard in writer.shards}


def config_dtype(hf_dir: Path, dtypes: set[torch.dtype]) -> dict[str, Any]:
    """The change of config.json for weights of these dtypes; none if they are mixed, or if it names no dtype."""
    changes = dtype_change(hf_dir, _short(*dtypes)) if len(dtypes) == 1 else {}
    return {key: value for key, value in changes.items() if key in json.loads((hf_dir / CONFIG).read_bytes())}


def _pieces(source: HFSource, plan: RankPlan, head_bias: float, on_bytes: OnBytes) -> Iterator[ShardedTensor]:
    """The rank's pieces with their data, each made when it is asked for."""
    for part in plan.parts:
        if source.is_fresh(part):
            is_bias = part.entry.rule.megatron.endswith(".bias")
            data = torch.full(part.meta.shape, head_bias if is_bias else 0.0)
        else:
            data = entry_shard(part.entry, source.config, plan.groups, source.tensors)
        pieces = part.pieces(data.to(source.dtypes[part.key]))
        del data
        while pieces:
            piece = pieces.pop(0)
            written = piece.data.nbytes
            yield piece
            on_bytes(written)


def describe(source: HFSource, folder: Path, layout: ParallelConfig, written: Mapping[str, FileDigest]) -> None:
    """Write the manifest, which makes the folder a checkpoint that ``train`` takes as ``init`` (no run to resume).

    Args:
        written: of ``write_checkpoint``.
    """
    role = source.role
    manifest = Manifest(
        step=0,
        run="converted",
        version=__version__,
        roles=[role],
        world_size=world_size_of(layout),
        layouts={role: layout.model_dump()},
        weights_only=True,
        head_format=source.head_format,
        files=digest_folder(folder, written),
    )
    write_manifest(folder, manifest)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
