"""Our models against transformers, over families, roles and layouts; launched by test_parity.py and parity_table.py.

Prints one JSON line per case from rank 0.  Arguments: a folder for the models, then (optional) families to run.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

import transformers as hf  # noqa: E402
from transformers.modeling_layers import GenericForTokenClassification  # noqa: E402
from transformers.models.olmo3.modeling_olmo3 import Olmo3PreTrainedModel  # noqa: E402

from tempo_megatron.checkpoint.hf_read import HFTensors  # noqa: E402
from tempo_megatron.config.schema import CriticConfig, OptimizerConfig, ParallelConfig, RoleConfig  # noqa: E402
from tempo_megatron.model.weights import load_hf_weights  # noqa: E402
from tempo_megatron.parallel.distributed import start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tempo_megatron.training.microbatch import Sequences  # noqa: E402

TEMPERATURE = 0.7
#: With this epsilon Adam's first step is smooth in the gradient, lr * g / (|g| + eps); the rate is so high that the
#: step stands out of the weights' rounding.
ADAM_EPS, LR = 1.0, 100.0
SHORT = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
#: Layouts per world size; data parallelism is what remains.  "distopt": the distributed optimizer.
LAYOUTS = {
    1: ["", "distopt"],
    2: ["", "distopt", "tp2", "tp2 sp", "pp2", "pp2 vpp2", "cp2"],
    4: [
        "distopt",
        "tp4 sp",
        "pp4",
        "cp4",
        "tp2 sp",
        "tp2 distopt",
        "pp2 distopt",
        "pp2 vpp2",
        "cp2",
        "tp2 pp2",
        "tp2 pp2 sp distopt",
        "tp2 pp2 vpp2 sp",
        "tp2 cp2",
        "tp2 cp2 sp distopt",
        "pp2 cp2",
        "pp2 vpp2 cp2 distopt",
    ],
}
MOE_LAYOUTS = {
    1: [],
    2: ["ep2", "ep2 distopt", "tp2 sp ep2", "tp2 sp etp2", "cp2 ep2"],
    4: ["ep4", "ep2", "ep2 distopt", "tp2 sp ep2 etp2", "tp2 sp ep2", "pp2 ep2 distopt", "pp2 vpp2 ep2", "cp2 ep2"],
}


@dataclass(frozen=True)
class Layout:
    name: str

    @property
    def parallel(self) -> ParallelConfig:
        values: dict[str, Any] = {"sequence_parallel": "sp" in self.name.split()}
        for word in self.name.split():
            if word not in ("sp", "distopt"):
                values[SHORT[word.rstrip("0123456789")]] = int(word.lstrip("abcdefghijklmnopqrstuvwxyz"))
        return ParallelConfig(**values)

    @property
    def distributed(self) -> bool:
        return "distopt" in self.name.split()

    def fits(self, family: str) -> bool:
        """Experts need experts, and Megatron trains them under tensor parallelism with sequence parallelism only."""
        if family == "qwen3-moe":
            return "tp" not in self.name or "sp" in self.name.split()
        return "ep" not in self.name and "etp" not in self.name


@cache
def configs() -> dict[str, hf.PretrainedConfig]:
    """Four layers, grouped-query attention, head_dim other than hidden / heads, an odd vocabulary."""
    common = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 10,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "vocab_size": 37,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    rope = {"rope_theta": 100.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **rope}
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        **rope,
    }
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    olmo_rope = {"sliding_attention": {"rope_type": "default", **rope}, "full_attention": yarn}
    found = {
        "qwen3": hf.Qwen3Config(**common, tie_word_embeddings=False, rope_parameters=yarn),
        "llama-tied": hf.LlamaConfig(**common, tie_word_embeddings=True),
        "llama": hf.LlamaConfig(**common, tie_word_embeddings=False, rope_parameters=llama3),
        "olmo3": hf.Olmo3Config(**common, sliding_window=4, rope_parameters=olmo_rope),
        "qwen3-moe": hf.Qwen3MoeConfig(**common, **experts, tie_word_embeddings=False),
    }
    for config in found.values():
        name = type(config).__name__.replace("Config", "ForCausalLM")
        config.architectures = [name]
    return found


class Olmo3ForTokenClassification(GenericForTokenClassification, Olmo3PreTrainedModel):
    """transformers has none; this is what its other families' classes look like."""


def reference(config: hf.PretrainedConfig, role: str) -> hf.PreTrainedModel:
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
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.startswith("score"):
                p.add_(0.1 * torch.randn_like(p))
    return model


def data() -> Sequences:
    g = torch.Generator().manual_seed(11)
    shapes = [(3, 5), (2, 1), (6, 4), (3, 5), (1, 7), (4, 3), (5, 2), (9, 10), (7, 1)]
    draw = lambda n: torch.randint(0, 37, (n,), generator=g).tolist()  # noqa: E731
    return Sequences([draw(p) for p, _ in shapes], [draw(r) for _, r in shapes])


def hf_outputs(model: hf.PreTrainedModel, sequences: Sequences, role: str) -> list[torch.Tensor]:
    rows = []
    for prompt, response in zip(sequences.prompts, sequences.responses, strict=True):
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
def wanted(name: str, role: str) -> Wanted:
    config = configs()[name]
    model = reference(config, role)
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


def build(config: hf.PretrainedConfig, role: str, layout: Layout, groups: ModelParallelGroups) -> MegatronEngine:
    role_config = (CriticConfig if role == "critic" else RoleConfig)(
        init="-",
        dtype="float32",
        parallel=layout.parallel,
        max_tokens_per_microbatch=24,
        optimizer=OptimizerConfig(lr=LR, eps=ADAM_EPS, distributed=layout.distributed, grad_clip=0.0),
    )
    return MegatronEngine(role, role_config, config, groups, seed=1, temperature=TEMPERATURE)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-3)).item()


def case(name: str, role: str, layout: Layout, groups: ModelParallelGroups, folder: Path) -> dict:
    config = configs()[name]
    engine = build(config, role, layout, groups)
    read = HFTensors(folder)
    load_hf_weights(engine.models, config, role, engine.groups, read)
    before = {n: t.clone() for n, t in engine.weight_stream(1)}
    tied = {"lm_head.weight"} if config.tie_word_embeddings and role == "actor" else set()
    roundtrip = set(before) == read.names - tied and all(torch.equal(before[n], read(n)) for n in before)
    engine.start_optimizer()

    sequences = data()
    tokens = sum(len(r) + (role == "critic") for r in sequences.responses)
    key = "log_probs" if role == "actor" else "values"
    got = engine.forward(sequences)[key]

    def loss(tables: dict[str, torch.Tensor], rows: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        table = tables[key]
        weights = torch.tensor([[weight_of(r, t) for t in range(table.shape[1])] for r in rows])
        return (table * weights).sum() / tokens, {}

    result = engine.step(sequences, loss)
    after = dict(engine.weight_stream(1))
    if dist.get_rank() != 0:
        return {}
    want = wanted(name, role)
    # The step that AdamW takes tells the gradient, whichever optimizer has reduced and applied it
    steps = {n: (before[n] - w) / LR for n, w in after.items()}
    wanted_steps = {n: g / (g.abs() + ADAM_EPS) for n, g in want.gradients.items()}
    return {
        "family": name,
        "role": role,
        "ranks": dist.get_world_size(),
        "layout": layout.name.replace("distopt", "").strip(),
        "dp": engine.groups.dp_size,
        "distopt": layout.distributed,
        "forward": max((got[i, : len(w)] - w).abs().max().item() for i, w in enumerate(want.outputs)),
        "loss": abs(result.loss - want.loss) / abs(want.loss),
        "gradient": max(relative(step, wanted_steps[n]) for n, step in steps.items()),
        "grad_norm": abs(result.grad_norm - want.norm) / want.norm,
        "parameters": len(after),
        "roundtrip": roundtrip,
    }


def save_reference(config: hf.PretrainedConfig, role: str, folder: Path) -> None:
    if dist.get_rank() == 0 and not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
            reference(config, role).save_pretrained(Path(tmp) / "m")
            (Path(tmp) / "m").rename(folder)
    dist.barrier()


def main() -> None:
    start(threads=1, timeout_s=60)
    shared, families = Path(sys.argv[1]), sys.argv[2:] or list(configs())
    cases = [(name, role) for name in families for role in ("actor", "critic")]
    for name, role in cases:
        save_reference(configs()[name], role, shared / f"{name}-{role}")
    world = dist.get_world_size()
    for layout in map(Layout, LAYOUTS[world] + MOE_LAYOUTS[world]):
        groups = ModelParallelGroups(layout.parallel, 60)
        for name, role in cases:
            if layout.fits(name):
                result = case(name, role, layout, groups, shared / f"{name}-{role}")
                if dist.get_rank() == 0:
                    print(json.dumps(result), flush=True)
        groups.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
