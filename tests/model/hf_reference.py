"""What transformers says about the models of parity_cases.py: outputs, a loss, its gradients."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as hf
from transformers.modeling_layers import GenericForTokenClassification
from transformers.models.olmo3.modeling_olmo3 import Olmo3PreTrainedModel

from tempo_megatron.training.microbatch import Sequences
from tests.model.parity_cases import config_of, off_constants

TEMPERATURE = 0.7


class Olmo3ForTokenClassification(GenericForTokenClassification, Olmo3PreTrainedModel):
    """transformers has none; this is what its other families' classes look like."""


def reference(config: hf.PretrainedConfig, role: str) -> hf.PreTrainedModel:
    """A random model, the same at every call."""
    torch.manual_seed(3)
    config = copy.deepcopy(config)
    config.num_labels = 1
    config._attn_implementation = "eager"
    if role == "actor":
        model = hf.AutoModelForCausalLM.from_config(config)
    elif isinstance(config, hf.Olmo3Config):
        model = Olmo3ForTokenClassification(config)
    else:
        model = hf.AutoModelForTokenClassification.from_config(config)
    model = model.float().eval()
    return off_constants(model)


def data() -> Sequences:
    g = torch.Generator().manual_seed(11)
    shapes = [(3, 5), (2, 1), (6, 4), (3, 5), (1, 7), (4, 3), (5, 2), (9, 10), (7, 1)]
    draw = lambda n: torch.randint(0, 37, (n,), generator=g).tolist()  # noqa: E731
    return Sequences.of([draw(p) for p, _ in shapes], [draw(r) for _, r in shapes])


def hf_outputs(model: hf.PreTrainedModel, sequences: Sequences, role: str) -> list[torch.Tensor]:
    rows = []
    for prompt, response in zip(sequences.prompts, sequences.responses.tolist(), strict=True):
        logits = model(torch.tensor([[*prompt, *response]])).logits[0]
        at = slice(len(prompt) - 1, len(prompt) + len(response) - (1 if role == "actor" else 0))
        if role == "critic":
            rows.append(logits[at, 0])
        else:
            log_probs = torch.log_softmax(logits[at] / TEMPERATURE, -1)
            rows.append(log_probs.gather(1, torch.tensor(response)[:, None])[:, 0])
    return rows


def weight_of(row: int, column: int) -> float:
    return 0.3 + 0.1 * row - 0.05 * column


@dataclass(frozen=True)
class Wanted:
    """What transformers says: outputs per row, the loss, and gradients under checkpoint names."""

    outputs: list[torch.Tensor]
    loss: float
    gradients: dict[str, torch.Tensor]
    norm: float


@cache
def wanted(family: str, role: str, **changes: int) -> Wanted:
    """Of the model ``config_of(family, **changes)``."""
    model = reference(config_of(family, **changes), role)
    outputs = hf_outputs(model, data(), role)
    tokens = sum(len(w) for w in outputs)
    parts = [(w * torch.tensor([weight_of(i, t) for t in range(len(w))])).sum() for i, w in enumerate(outputs)]
    loss = torch.stack(parts).sum() / tokens
    loss.backward()
    gradients = {}
    for key, p in model.named_parameters():
        assert p.grad is not None
        gradients.update(per_expert(key, p.grad))
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    return Wanted([w.detach() for w in outputs], loss.item(), gradients, norm)


def per_expert(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """transformers 5 holds the experts of a layer in one tensor, checkpoints hold them one by one."""
    prefix, found, what = key.partition(".experts.")
    if not found:
        return {key: tensor}
    result = {}
    for e, own in enumerate(tensor):
        if what == "gate_up_proj":
            gate, up = own.chunk(2)
            result |= {f"{prefix}.experts.{e}.gate_proj.weight": gate, f"{prefix}.experts.{e}.up_proj.weight": up}
        else:
            result[f"{prefix}.experts.{e}.{what}.weight"] = own
    return result


def save_reference(config: hf.PretrainedConfig, role: str, folder: Path) -> None:
    """By rank 0, unless it is there; every rank waits for it."""
    if dist.get_rank() == 0 and not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
            reference(config, role).save_pretrained(Path(tmp) / "m")
            (Path(tmp) / "m").rename(folder)
    dist.barrier()
