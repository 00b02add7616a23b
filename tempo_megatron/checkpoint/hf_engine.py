"""A role's weights from an HF folder and into one; collective over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from tempo_megatron.checkpoint.critic_format import (
    ACTIVATION,
    HeadFormat,
    activation_change,
    check_activation,
    critic_folder,
    open_hf_folder,
)
from tempo_megatron.checkpoint.hf_check import check_hf_folder
from tempo_megatron.checkpoint.hf_write import HFWriter, dtype_change
from tempo_megatron.checkpoint.load import load_weights, source_role
from tempo_megatron.checkpoint.manifest import read_manifest
from tempo_megatron.checkpoint.verify import verify
from tempo_megatron.config.schema import CriticConfig
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import InitSource
from tempo_megatron.model.weights import load_hf_weights
from tempo_megatron.parallel.distributed import on_all_ranks, on_rank0, rank
from tempo_megatron.training.engine import MegatronEngine


def load_initial_weights(engine: MegatronEngine, source: InitSource) -> None:
    """Weights of a fresh role from an HF folder or a checkpoint; what is wrong with them is raised on every rank."""
    init_head = isinstance(engine.config, CriticConfig) and engine.config.init_head
    if source.kind == "checkpoint":
        from_role = on_rank0(
            lambda: source_role(source.path, read_manifest(source.path), engine.role, init_head=init_head)
        )
        checkpoint = verify(source.path, {from_role, source.hf_dir.name})
        if not load_weights(checkpoint, engine, init_head=init_head):
            _check_head(engine, source.path)
        return

    def check() -> bool:
        tensors = open_hf_folder(source.path, engine.role)
        return check_hf_folder(tensors, engine.hf_config, engine.role, init_head=init_head)

    def load() -> None:
        tensors = open_hf_folder(source.path, engine.role)
        load_hf_weights(engine.models, engine.hf_config, engine.role, engine.groups, tensors, skip_head=keep_head)

    try:
        keep_head = on_rank0(check)
        if not keep_head:
            _check_head(engine, source.path)
        on_all_ranks(load)
    except TempoError as error:
        raise TempoError(f"{engine.role}.init: {error}") from error


def _check_head(engine: MegatronEngine, path: Path) -> None:
    if isinstance(engine.config, CriticConfig):
        check_activation(getattr(engine.hf_config, ACTIVATION, None), engine.config.head, str(path))


def export_hf(
    engine: MegatronEngine, hf_dir: Path, target: Path, bucket_mib: int, head_format: HeadFormat | None = None
) -> None:
    """Write a role as an HF folder with the weights' own dtypes. All ranks call it, rank 0 writes.

    Args:
        hf_dir: folder whose config, tokenizer and generation config (and a critic's carried output layer) go along.
        bucket_mib: weights that travel between ranks at a time.
        head_format: of a critic, see ``critic_format``.

    Raises:
        RunError: the folder cannot be written; an older one is as it was.
    """
    stream = iter(engine.weight_stream(bucket_mib))
    tensors: Iterator[tuple[str, Tensor]]
    changes: dict[str, Any]
    failure: OSError | TempoError | None = None
    if rank() == 0:
        try:
            tensors, changes = stream, {}
            if engine.role == "critic":
                tensors, changes = critic_folder(stream, engine.hf_config, hf_dir, head_format)
                changes |= activation_change(getattr(engine.config, "head", "regression"))
            changes |= dtype_change(hf_dir, engine.config.dtype)
            HFWriter(target).write(tensors, hf_dir, changes)
        except (OSError, TempoError) as error:
            failure = error
    for _ in stream:  # the other ranks take part in gathering; so does rank 0 when it could not write
        pass

    def tell() -> None:
        if failure is not None:
            raise failure

    on_rank0(tell)
