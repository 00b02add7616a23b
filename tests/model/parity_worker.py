"""Launched by test_parity.py on 1, 2 or 4 ranks: our models against transformers, over layouts.

Prints one JSON line per case from rank 0.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

import transformers as hf  # noqa: E402

from tempo_megatron.checkpoint.hf_files import HFTensors  # noqa: E402
from tempo_megatron.config.schema import CriticConfig, OptimizerConfig, ParallelConfig, RoleConfig  # noqa: E402
from tempo_megatron.model.weights import load_hf_weights  # noqa: E402
from tempo_megatron.parallel.distributed import start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tempo_megatron.training.microbatch import Sequences  # noqa: E402

TEMPERATURE = 0.7
# (tp, pp, sp) per world size; dp is what remains
LAYOUTS = {
    1: [(1, 1, False)],
    2: [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False)],
    4: [(2, 2, False), (2, 2, True), (2, 1, True), (1, 2, False)],
}


def configs() -> dict[str, hf.PretrainedConfig]:
    """head_dim differs from hidden/heads, and the vocabulary is odd."""
    common = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "vocab_size": 37,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    qwen3 = hf.Qwen3Config(**common, head_dim=32, tie_word_embeddings=False)
    llama = hf.LlamaConfig(**common, tie_word_embeddings=True)
    qwen3.architectures, llama.architectures = ["Qwen3ForCausalLM"], ["LlamaForCausalLM"]
    return {"qwen3": qwen3, "llama-tied": llama}


def reference(config: hf.PretrainedConfig, role: str) -> hf.PreTrainedModel:
    torch.manual_seed(3)
    auto = hf.AutoModelForCausalLM if role == "actor" else hf.AutoModelForTokenClassification
    config.num_labels = 1
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


def data() -> Sequences:
    g = torch.Generator().manual_seed(11)
    shapes = [(3, 5), (2, 1), (6, 4), (3, 5), (1, 7), (4, 3), (5, 2)]
    draw = lambda n: torch.randint(0, 37, (n,), generator=g).tolist()  # noqa: E731
    return Sequences([draw(p) for p, _ in shapes], [draw(r) for _, r in shapes])


def hf_outputs(model: hf.PreTrainedModel, sequences: Sequences, role: str) -> list[torch.Tensor]:
    rows = []
    for prompt, response in zip(sequences.prompts, sequences.responses, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        logits = model(ids).logits[0]
        at = slice(len(prompt) - 1, len(prompt) + len(response) - (1 if role == "actor" else 0))
        if role == "critic":
            rows.append(logits[at, 0])
        else:
            log_probs = torch.log_softmax(logits[at] / TEMPERATURE, -1)
            rows.append(log_probs.gather(1, torch.tensor(response)[:, None])[:, 0])
    return rows


def weight_of(row: int, column: int) -> float:
    return 0.3 + 0.1 * row - 0.05 * column


def case(name: str, config: hf.PretrainedConfig, role: str, layout: tuple[int, int, bool], folder: Path) -> dict:
    tp, pp, sp = layout
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sp)
    groups = ModelParallelGroups(parallel, 60)
    role_config = (CriticConfig if role == "critic" else RoleConfig)(
        init="-",
        dtype="float32",
        parallel=parallel,
        max_tokens_per_microbatch=16,
        # the plain optimizer leaves whole gradients on every rank, which is what is compared
        optimizer=OptimizerConfig(lr=1e-2, distributed=False, grad_clip=0.0),
    )
    engine = MegatronEngine(role, role_config, config, groups, seed=1, temperature=TEMPERATURE)
    read = HFTensors(folder)
    load_hf_weights(engine.model, config, role, groups, read)
    exported = dict(engine.weight_stream(1))
    roundtrip = all(torch.equal(exported[n], read(n)) for n in exported) and set(exported) == read.names - (
        {"lm_head.weight"} if config.tie_word_embeddings and role == "actor" else set()
    )
    engine.start_optimizer()

    sequences = data()
    model = reference(config, role)
    wanted = hf_outputs(model, sequences, role)
    tokens = sum(len(w) for w in wanted)
    hf_loss = (
        sum((w * torch.tensor([weight_of(i, t) for t in range(len(w))])).sum() for i, w in enumerate(wanted)) / tokens
    )
    hf_loss.backward()

    key = "log_probs" if role == "actor" else "values"
    got = engine.forward(sequences)[key]
    forward_error = max((got[i, : len(w)] - w.detach()).abs().max().item() for i, w in enumerate(wanted))

    def loss(tables: dict[str, torch.Tensor], rows: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        table = tables[key]
        weights = torch.tensor([[weight_of(r, t) for t in range(table.shape[1])] for r in rows])
        return (table * weights).sum() / tokens, {}

    grads: dict[str, torch.Tensor] = {}
    step = engine.optimizer.step

    def keep_gradients_then_step() -> object:
        with torch.no_grad():
            saved = [(p, p.data) for p in engine.model.parameters()]
            for p, _ in saved:
                p.data = p.main_grad.clone()
            grads.update(engine.weight_stream(1))
            for p, d in saved:
                p.data = d
        return step()

    engine.optimizer.step = keep_gradients_then_step
    result = engine.step(sequences, loss)
    named = dict(model.named_parameters())
    named["lm_head.weight"] = named.get("lm_head.weight", named.get("model.embed_tokens.weight"))
    gradient_error = max(
        ((grads[n] - named[n].grad).abs().max() / named[n].grad.abs().max().clamp_min(1e-3)).item() for n in grads
    )
    return {
        "case": f"{name} {role} tp{tp} pp{pp} sp{int(sp)} dp{groups.dp_size}",
        "forward": forward_error,
        "loss": abs(result.loss - hf_loss.item()),
        "gradient": gradient_error,
        "parameters": len(grads),
        "roundtrip": roundtrip,
    }


def main() -> None:
    start(threads=1, timeout_s=60)
    world = dist.get_world_size()
    shared = Path(sys.argv[1])
    for name, config in configs().items():
        for role in ("actor", "critic"):
            folder = shared / f"{name}-{role}"
            if dist.get_rank() == 0 and not folder.exists():
                with tempfile.TemporaryDirectory(dir=shared) as tmp:
                    reference(config, role).save_pretrained(Path(tmp) / "m")
                    (Path(tmp) / "m").rename(folder)
            dist.barrier()
            for layout in LAYOUTS[world]:
                result = case(name, config, role, layout, folder)
                if dist.get_rank() == 0:
                    print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
