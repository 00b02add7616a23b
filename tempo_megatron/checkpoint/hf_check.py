"""Does an HF folder hold exactly the tensors that its config.json asks for? Asked of headers, before anything is read.

The shapes are those of transformers' own model of that config, built on the meta device.
"""

from __future__ import annotations

import re

import torch
from transformers import AutoModel, PretrainedConfig

from tempo_megatron.checkpoint.critic_format import BIAS, LM_HEAD, WEIGHT
from tempo_megatron.checkpoint.hf_read import HFTensors
from tempo_megatron.errors import TempoError
from tempo_megatron.model.build import Role
from tempo_megatron.model.families import family_of
from tempo_megatron.model.weights import expected_hf_names, unexpected_hf_names


def check_hf_folder(tensors: HFTensors, config: PretrainedConfig, role: Role, *, init_head: bool) -> bool:
    """Compare names and shapes with the model's.

    Args:
        tensors: the folder as ``open_hf_folder`` reads it for this role.
        init_head: a critic's folder may lack a value head.

    Returns:
        Whether the value head is to stay as it was built: a critic from a folder without one.

    Raises:
        TempoError: naming the file and the tensor, when a tensor is missing, has no place or has another shape.
    """
    headless = role == "critic" and WEIGHT not in tensors.names
    if headless and not init_head:
        raise TempoError(
            f"{tensors.folder} has no value head ({WEIGHT}); set critic.init_head=true to start with a fresh one"
        )
    if role == "critic" and not headless:
        _check_labels(tensors, config)
    extra = sorted(unexpected_hf_names(tensors.names, config, role, skip_head=headless))
    if extra:
        raise TempoError(
            f"{tensors.describe(extra[0])} has no place in {_a(role)} of {family_of(config).architecture}"
            f"{_and_more(extra)}"
        )
    expected = expected_hf_names(config, role) - ({WEIGHT, BIAS} if headless else set())
    missing = sorted(expected - tensors.names)
    if missing:
        raise TempoError(
            f"{tensors.listing}: tensor {missing[0]} is missing; config.json asks for it{_and_more(missing)}"
        )
    shapes = expected_shapes(config)
    for name in sorted(expected):
        if tensors.shape_of(name) != shapes[name]:
            raise TempoError(
                f"{tensors.describe(name)} has the shape {list(tensors.shape_of(name))}, "
                f"config.json asks for {list(shapes[name])}"
            )
    return headless


def _check_labels(tensors: HFTensors, config: PretrainedConfig) -> None:
    """A value is one number per token: a token classifier with one label."""
    path = tensors.folder / "config.json"
    classifier = any(name.endswith("ForTokenClassification") for name in config.architectures or ())
    if classifier and config.num_labels != 1:
        raise TempoError(f"{path}: num_labels (id2label) is {config.num_labels}; a critic has 1")
    rows = tensors.shape_of(WEIGHT)[0] if tensors.shape_of(WEIGHT) else 0
    if rows != 1:
        raise TempoError(f"{tensors.describe(WEIGHT)} has {rows} rows (num_labels in {path}); a critic has 1")


def expected_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """HF tensor name -> shape, for backbone, output layer and value head."""
    with torch.device("meta"):
        backbone = AutoModel.from_config(config, attn_implementation="eager", trust_remote_code=False)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in backbone.state_dict().items():
        shapes.update(_as_saved(f"model.{name}", tuple(tensor.shape)))
    hidden = config.hidden_size
    return {**shapes, LM_HEAD: (config.vocab_size, hidden), WEIGHT: (1, hidden), BIAS: (1,)}


def _as_saved(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names in files: transformers stacks a layer's experts in memory and saves them one by one."""
    match = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
    if match is None:
        return {name: shape}
    experts, rows, columns = shape
    parts = {"down_proj": rows} if match[2] == "down_proj" else {"gate_proj": rows // 2, "up_proj": rows // 2}
    return {
        f"{match[1]}.{expert}.{part}.weight": (size, columns)
        for expert in range(experts)
        for part, size in parts.items()
    }


def _a(role: Role) -> str:
    return "an actor" if role == "actor" else "a critic"


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
