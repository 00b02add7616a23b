"""Does an HF folder hold exactly the tensors that its config.json asks for? Asked before weights are loaded."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from tempo_megatron.checkpoint.critic_format import BIAS, WEIGHT
from tempo_megatron.checkpoint.hf_read import HFTensors
from tempo_megatron.config.architectures import is_critic
from tempo_megatron.errors import TempoError
from tempo_megatron.model.families import family_of
from tempo_megatron.model.hf_tensors import EMBEDDING, LM_HEAD, Role, expected_tensors, unexpected_tensors

#: Rows of an embedding that are compared at a time.
ROWS = 4096


def check_hf_folder(tensors: HFTensors, config: PretrainedConfig, role: Role, *, init_head: bool) -> bool:
    """Compare names and shapes with the model's.

    Args:
        tensors: the folder as ``open_hf_folder`` reads it for this role.
        init_head: a critic's folder may lack a value head.

    Returns:
        Whether the value head is to stay as it was built: a critic from a folder without one.

    Raises:
        TempoError: naming the file and the tensor, when a tensor is missing, has no place or has another shape, or
            when the output layer of a tied model is not the embedding.
    """
    headless = role == "critic" and WEIGHT not in tensors.names
    if headless and not init_head:
        raise TempoError(
            f"{tensors.folder} has no value head ({WEIGHT}); set critic.init_head=true to start with a fresh one"
        )
    if role == "critic" and not headless:
        _check_labels(tensors, config)
    extra = sorted(unexpected_tensors(tensors.names, config, role, skip_head=headless))
    if extra:
        raise TempoError(
            f"{tensors.describe(extra[0])} has no place in {_a(role)} of {family_of(config).architecture}"
            f"{_and_more(extra)}"
        )
    expected = expected_tensors(config, role)
    if headless:
        del expected[WEIGHT], expected[BIAS]
    missing = sorted(expected.keys() - tensors.names)
    if missing:
        raise TempoError(
            f"{tensors.listing}: tensor {missing[0]} is missing; config.json asks for it{_and_more(missing)}"
        )
    for name, shape in sorted(expected.items()):
        if tensors.shape_of(name) != shape:
            raise TempoError(
                f"{tensors.describe(name)} has the shape {list(tensors.shape_of(name))}, "
                f"config.json asks for {list(shape)}"
            )
    if role == "actor" and config.tie_word_embeddings and LM_HEAD in tensors.names:
        _check_tied(tensors)
    return headless


def _check_tied(tensors: HFTensors) -> None:
    """A tied model reads its output layer from the embedding: one that is stored besides must be the same."""
    head, embedding = tensors(LM_HEAD), tensors(EMBEDDING)
    same = head.shape == embedding.shape and all(
        torch.equal(a.float(), b.float())  # float32 holds every dtype that is read; a whole copy would be large
        for a, b in zip(head.split(ROWS), embedding.split(ROWS), strict=True)
    )
    if not same:
        raise TempoError(
            f"{tensors.describe(LM_HEAD)} differs from {EMBEDDING}, but {tensors.folder / 'config.json'} says "
            "tie_word_embeddings: true, so that it would be lost; set that to false, or remove the tensor"
        )


def _check_labels(tensors: HFTensors, config: PretrainedConfig) -> None:
    """A value is one number: of a classifier with one label."""
    path = tensors.folder / "config.json"
    classifier = any(is_critic(name) for name in config.architectures or ())
    if classifier and config.num_labels != 1:
        raise TempoError(f"{path}: num_labels (id2label) is {config.num_labels}; a critic has 1")
    rows = tensors.shape_of(WEIGHT)[0] if tensors.shape_of(WEIGHT) else 0
    if rows != 1:
        raise TempoError(f"{tensors.describe(WEIGHT)} has {rows} rows (num_labels in {path}); a critic has 1")


def _a(role: Role) -> str:
    return "an actor" if role == "actor" else "a critic"


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
