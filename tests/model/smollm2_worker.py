"""Launched by test_smollm2.py: the real SmolLM2-135M against transformers, against its own files, against vLLM.

Arguments: the HF folder (float32), a folder for what this writes.  One rank does everything and leaves what
transformers says for two ranks, which compare their layouts with it.  Rank 0 prints one JSON line per case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from tempo_megatron.checkpoint.hf_engine import export_hf, load_initial_weights  # noqa: E402
from tempo_megatron.checkpoint.hf_read import HFTensors, load_hf_config  # noqa: E402
from tempo_megatron.checkpoint.hf_write import HFWriter  # noqa: E402
from tempo_megatron.config.rollout import RolloutConfig  # noqa: E402
from tempo_megatron.config.schema import ParallelConfig, RoleConfig  # noqa: E402
from tempo_megatron.data.encode import encode_sft  # noqa: E402
from tempo_megatron.data.sft import SftRecord  # noqa: E402
from tempo_megatron.locate import InitSource  # noqa: E402
from tempo_megatron.parallel.distributed import start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.rollout.engine import GenerationRequest, RolloutEngine  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tempo_megatron.training.microbatch import Sequences  # noqa: E402
from tests.everywhere import everywhere  # noqa: E402

CHATS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name a colour.", "Blue."),
    (
        "Tell me in two sentences what photosynthesis is, as you would to a child of ten years.",
        "Plants catch sunlight with their green leaves. They use it to turn water and air into sugar and oxygen.",
    ),
    ("What is 17 + 25?", "17 + 25 = 42"),
    (
        "Write a Python function that adds two numbers.",
        "```python\ndef add(a: float, b: float) -> float:\n    return a + b\n```",
    ),
]
#: The longest chat takes 72 tokens: several packs, most of several chats.
MAX_TOKENS = 128
LAYOUTS = {
    1: {"one rank": ParallelConfig()},
    2: {"pp2": ParallelConfig(pipeline_model_parallel_size=2), "cp2": ParallelConfig(context_parallel_size=2)},
}
BUCKET_MIB = 32
SAMPLES, RESPONSE_TOKENS = 4, 24


def loaded(folder: Path, groups: ModelParallelGroups, dtype: str = "float32") -> MegatronEngine:
    config = RoleConfig(init=str(folder), dtype=dtype, parallel=groups.layout, max_tokens_per_microbatch=MAX_TOKENS)
    engine = MegatronEngine("actor", config, load_hf_config(folder), groups, seed=1)
    load_initial_weights(engine, InitSource("hf", folder, folder))
    return engine


def chats(folder: Path) -> Sequences:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    records = [SftRecord(q, [{"role": "user", "content": q}], answer) for q, answer in CHATS]
    return Sequences.of(*encode_sft(tokenizer, records, MAX_TOKENS))


@torch.no_grad()
def write_reference(folder: Path, sequences: Sequences, file: Path) -> None:
    """Log-probabilities and entropies by transformers, sequence by sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    said: dict[str, torch.Tensor] = {}
    for i, (prompt, response) in enumerate(zip(sequences.prompts, sequences.responses.tolist(), strict=True)):
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1)
        said[f"log_probs.{i}"] = log_probs.gather(1, torch.tensor(response)[:, None])[:, 0].contiguous()
        said[f"entropy.{i}"] = -(log_probs.exp() * log_probs).sum(-1)
    save_file(said, file)


def parity(engine: MegatronEngine, sequences: Sequences, reference: Path) -> dict[str, float]:
    """Largest distance to what transformers says, of any token of any chat."""
    outputs, said = engine.forward(sequences), load_file(reference)
    return {
        name: max((row - said[f"{name}.{i}"]).abs().max().item() for i, row in enumerate(everywhere(rows)))
        for name, rows in outputs.items()
    }


def differing(engine: MegatronEngine, folder: Path) -> list[str]:
    """Names of the tensors that the stream gives otherwise than the folder holds them, in bytes or at all."""
    stored = HFTensors(folder)
    left = set(stored.names)
    wrong = []
    for name, tensor in engine.weight_stream(BUCKET_MIB):
        same = name in left and tensor.dtype == stored.dtype_of(name)
        if not (same and torch.equal(tensor.view(torch.uint8), stored(name).view(torch.uint8))):
            wrong.append(name)
        left.discard(name)
    return [*wrong, *sorted(left)]


def round_trip(folder: Path, work: Path, groups: ModelParallelGroups) -> dict[str, object]:
    """In bfloat16, the dtype that the model was published in: folder -> Megatron -> folder."""
    source, target = work / "bf16", work / "exported"
    stored = HFTensors(folder)
    tensors = ((name, stored(name).bfloat16()) for name in sorted(stored.names))
    HFWriter(source).write(tensors, folder, {"dtype": "bfloat16"})
    engine = loaded(source, groups, "bfloat16")
    wrong = differing(engine, source)
    export_hf(engine, source, target, BUCKET_MIB)
    return {"differing": wrong, "tensors": len(stored.names)}


def vllm_agreement(engine: MegatronEngine, folder: Path, sequences: Sequences) -> dict[str, float]:
    """Responses sampled by vLLM on Megatron's weights: both log-probabilities of every sampled token."""
    config = RolloutConfig(dtype="float32", kv_cache_gib=0.25, max_num_seqs=32, max_num_batched_tokens=512)
    stop = engine.hf_config.eos_token_id
    rollout = RolloutEngine(folder, config, max_model_len=MAX_TOKENS, seed=0, stop_token_ids=[stop])
    rollout.update_weights(engine.weight_source(), 1)
    requests = [GenerationRequest(list(p), 100 * i, SAMPLES, RESPONSE_TOKENS) for i, p in enumerate(sequences.prompts)]
    responses = rollout.generate(requests, 1)
    rollout.close()
    sampled = Sequences.of(
        [p for p in sequences.prompts for _ in range(SAMPLES)], [response.token_ids for response in responses]
    )
    said = torch.tensor([x for response in responses for x in response.log_probs])
    distance = (everywhere(engine.forward(sampled)["log_probs"]).values - said).abs()
    return {
        "tokens": len(distance),
        "distinct": len({tuple(r.token_ids) for r in responses}),
        "stopped": sum(r.finish_reason == "stop" for r in responses),
        "mean": distance.mean().item(),
        "max": distance.max().item(),
    }


def tell(case: str, **values: object) -> None:
    if dist.get_rank() == 0:
        print(json.dumps({"case": case, **values}), flush=True)


def main() -> None:
    start(threads=1, timeout_s=120)
    folder, work = Path(sys.argv[1]), Path(sys.argv[2])
    reference = work / "reference.safetensors"
    sequences = chats(folder)
    world = dist.get_world_size()
    if world == 1:
        write_reference(folder, sequences, reference)
    for name, layout in LAYOUTS[world].items():
        groups = ModelParallelGroups(layout, 120)
        engine = loaded(folder, groups)
        tell(
            name,
            lengths=sequences.lengths,
            tokens=sum(map(len, sequences.responses)),
            **parity(engine, sequences, reference),
            differing=differing(engine, folder),
        )
        if world == 1:
            tell("vllm", **vllm_agreement(engine, folder, sequences))
            del engine
            tell("round trip", **round_trip(folder, work, groups))
        groups.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
