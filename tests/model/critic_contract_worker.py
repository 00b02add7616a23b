"""The critic's contract over layouts, against plain torch; launched by test_critic_contract.py.

Argument: a folder for models and checkpoints.  Prints one JSON line per case from rank 0.
"""

from __future__ import annotations

import gc
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.algorithm.advantages import target_states  # noqa: E402
from tempo_megatron.algorithm.policy_loss import loss_denominator  # noqa: E402
from tempo_megatron.algorithm.value_loss import value_loss  # noqa: E402
from tempo_megatron.checkpoint.hf_engine import export_hf, load_initial_weights  # noqa: E402
from tempo_megatron.checkpoint.hf_read import load_hf_config  # noqa: E402
from tempo_megatron.checkpoint.load import resume_checkpoint  # noqa: E402
from tempo_megatron.checkpoint.verify import verify  # noqa: E402
from tempo_megatron.config.schema import CriticConfig, RoleConfig  # noqa: E402
from tempo_megatron.data.ragged import Ragged  # noqa: E402
from tempo_megatron.errors import TempoError  # noqa: E402
from tempo_megatron.locate import resolve_init  # noqa: E402
from tempo_megatron.parallel.distributed import on_rank0, start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import LossFunction, MegatronEngine, StepResult  # noqa: E402
from tempo_megatron.training.microbatch import Sequences  # noqa: E402
from tests.checkpoint.folders import reseal  # noqa: E402
from tests.checkpoint.saving import save_checkpoint  # noqa: E402
from tests.everywhere import everywhere  # noqa: E402
from tests.model import critic_oracle as oracle  # noqa: E402
from tests.model.hf_reference import TEMPERATURE, data, save_reference, wanted  # noqa: E402
from tests.model.parity_cases import Layout, config_of  # noqa: E402
from tests.model.parity_worker import relative  # noqa: E402

LOSS_AGG = "seq-mean-token-mean"
#: (family, layout, token budget of a micro-batch), per world size
TRAINING = {
    1: [("llama-tied", "", 20), ("llama-tied", "", 4096), ("llama-tied", "distopt", 40), ("olmo3", "", 40)],
    2: [
        *(("llama-tied", name, 24) for name in ("", "distopt", "tp2", "tp2 sp", "pp2", "pp2 vpp2", "cp2")),
        ("llama-tied", "cp2 distopt", 4096),
        *(("olmo3", name, 40) for name in ("tp2 sp", "pp2 vpp2 distopt", "cp2")),
    ],
    4: [("llama-tied", "tp2 pp2 sp distopt", 24), ("olmo3", "tp2 cp2 sp", 24)],
}
#: (layout, dtype): save, resume, go on
RESUMED = {
    1: [("", "float32"), ("", "bfloat16")],
    2: [("distopt", "bfloat16"), ("tp2 sp", "bfloat16"), ("pp2 vpp2 distopt", "bfloat16"), ("cp2", "float32")],
    4: [("tp2 pp2 sp distopt", "bfloat16")],
}
#: layouts of actor and critic in one job
TWO_LAYOUTS = {1: [], 2: [("tp2 sp", "cp2"), ("distopt", "pp2 vpp2")], 4: [("tp2 sp", "pp2 cp2")]}


def build(
    role: str, folder: Path, layout: Layout, groups: ModelParallelGroups, *, tokens: int = 24, **changes: Any
) -> MegatronEngine:
    optimizer = changes.pop("optimizer", oracle.OPTIMIZER).model_copy(update={"distributed": layout.distributed})
    config = (CriticConfig if role == "critic" else RoleConfig)(
        **{"init": str(folder), "dtype": "float32", **changes},
        parallel=layout.parallel,
        max_tokens_per_microbatch=tokens,
        optimizer=optimizer,
    )
    source = resolve_init(str(folder), f"{role}.init")
    return MegatronEngine(role, config, load_hf_config(source.hf_dir), groups, seed=1, temperature=TEMPERATURE)


def started(*args: Any, **kwargs: Any) -> MegatronEngine:
    """An engine with the weights of its folder."""
    engine = build(*args, **kwargs)
    load_initial_weights(engine, resolve_init(engine.config.init, f"{engine.role}.init"))
    engine.start_optimizer()
    return engine


def project_loss(old: Tensor) -> LossFunction:
    """The E-step's loss on the labelled rows of ``data()``."""
    labeled = torch.tensor([o is not None for o in oracle.OUTCOMES])
    outcome = torch.tensor([float("nan") if o is None else o for o in oracle.OUTCOMES])
    states = target_states(outcome, labeled, data().response_lengths, position="post_last")
    target_mask = torch.arange(int(states.max())) < states[:, None]
    targets = torch.where(target_mask, outcome[:, None], 0.0)
    denominator = loss_denominator(states, LOSS_AGG)

    def loss(tables: dict[str, Tensor], rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        values = tables["values"]
        width = values.shape[1]
        return value_loss(
            values,
            old[rows, :width],
            targets[rows, :width],
            target_mask[rows, :width],
            value_clip=oracle.VALUE_CLIP,
            loss_agg=LOSS_AGG,
            denominator=denominator,
        )

    return loss


def worst_row(held: Ragged, want: list[Tensor]) -> float:
    """Largest difference within the rows. Collective; ranks that hold the same row must have the same bits."""
    return max((row - w).abs().max().item() for row, w in zip(everywhere(held), want, strict=True))


def tensors_of(engine: MegatronEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.weight_stream(1)}


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a
    )


def training(root: Path, family: str, layout: Layout, groups: ModelParallelGroups, tokens: int) -> dict[str, Any]:
    """Values, then three steps of the E-step's loss: clipped, with a rate that changes."""
    want = oracle.trained(family)
    engine = started("critic", root / f"{family}-critic", layout, groups, tokens=tokens)
    values = engine.forward(data())["values"]
    steps = [engine.step(data(), project_loss(everywhere(values).padded())) for _ in oracle.RATES]
    after = tensors_of(engine)
    # of the weights, what is compared is how far they moved
    moved = {n: relative(after[n] - want.before[n], want.after[n] - want.before[n]) for n in want.after}
    head = {n: moved.pop(n) for n in ("score.weight", "score.bias")}
    return {
        "values": worst_row(values, want.values),
        "values_of_step": worst_row(steps[0].outputs["values"], want.values),
        "rates": [s.lr for s in steps],
        "loss": max(abs(s.loss - w) / w for s, w in zip(steps, want.losses, strict=True)),
        "grad_norm": max(abs(s.grad_norm - w) / w for s, w in zip(steps, want.norms, strict=True)),
        "clipped": min(want.norms) > oracle.OPTIMIZER.grad_clip,
        "head": head,
        "backbone": max(moved.values()),
        "tensors": len(after),
        "last_loss": steps[-1].loss,
    }


@contextmanager
def reductions(group: dist.ProcessGroup) -> Iterator[list[int]]:
    """Counts all-reduces over a group."""
    original, count = dist.all_reduce, [0]

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        count[0] += kwargs.get("group") is group
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield count
    finally:
        dist.all_reduce = original


def tied(root: Path, layout: Layout, groups: ModelParallelGroups) -> dict[str, Any]:
    """With tied embeddings and pipeline stages only the actor sums the embedding's gradient over the stages."""
    counts = {}
    for role in ("actor", "critic"):
        engine = started(role, root / f"llama-tied-{role}", layout, groups)
        loss = project_loss(torch.zeros(9, 11)) if role == "critic" else mean_log_prob
        with reductions(groups._globals["_EMBEDDING_GROUP"]) as count:
            engine.step(data(), loss)
        counts[role] = count[0]
    name = f"exported-{layout.name.replace(' ', '-')}"
    export_hf(engine, root / "llama-tied-critic", root / name, 1)
    dist.barrier()
    exported = load_file(root / name / "model.safetensors")
    config = json.loads((root / name / "config.json").read_text())
    return {
        "reductions": counts,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "heads": sorted(n for n in exported if n.startswith(("lm_head", "score"))),
    }


def mean_log_prob(tables: dict[str, Tensor], rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    return -tables["log_probs"].sum() / 38, {}


def two_layouts(root: Path, actor: Layout, critic: Layout) -> dict[str, Any]:
    """Both roles in one job, each in its layout, taking turns; rows are told apart by their position alone."""
    groups = [ModelParallelGroups(layout.parallel, 60) for layout in (actor, critic)]
    engines = [
        started(role, root / f"llama-tied-{role}", layout, own)
        for role, layout, own in zip(("actor", "critic"), (actor, critic), groups, strict=True)
    ]
    order = torch.randperm(len(data()), generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = Sequences.of([data().prompts[i] for i in order], [data().responses[i].tolist() for i in order])
    policy, values = wanted("llama-tied", "actor").outputs, oracle.trained("llama-tied")
    log_probs = engines[0].forward(shuffled)["log_probs"]
    got = engines[1].forward(shuffled)["values"]
    engines[0].step(shuffled, mean_log_prob)
    old = everywhere(engines[1].forward(data())["values"]).padded()
    steps = [engines[1].step(data(), project_loss(old)) for _ in oracle.RATES]
    result = {
        "log_probs": worst_row(log_probs, [policy[i] for i in order]),
        "values": worst_row(got, [values.values[i] for i in order]),
        "loss": abs(steps[-1].loss - values.losses[-1]) / values.losses[-1],
    }
    for own in groups:
        own.close()
    return result


def resumed(root: Path, layout: Layout, dtype: str, groups: ModelParallelGroups) -> dict[str, Any]:
    """Two steps, a checkpoint and a third; then a fresh critic, from the checkpoint, takes the third."""
    folder, run = root / "llama-tied-critic", root / f"run-{layout.name.replace(' ', '-')}-{dtype}"
    stored = load_file(folder / "model.safetensors")
    engine = started("critic", folder, layout, groups, dtype=dtype)
    before = tensors_of(engine)
    loss = project_loss(everywhere(engine.forward(data())["values"]).padded())
    steps = [engine.step(data(), loss) for _ in range(2)]
    checkpoint = save_checkpoint(run, 2, {"critic": engine}, {"step": 2}, {"critic": folder}, keep=1).folder
    saved = tensors_of(engine)
    export_hf(engine, folder, run / "hf", 1)
    third, next_rate = engine.step(data(), loss), rate(engine)
    after = tensors_of(engine)

    again = build("critic", folder, layout, groups, dtype=dtype)
    again.start_optimizer()
    resume_checkpoint(verify(checkpoint), {"critic": again})
    restored = tensors_of(again)
    exported = on_rank0(lambda: load_file(run / "hf" / "model.safetensors"))
    head = [n for n in before if n.startswith("score.")]
    return {
        "dtypes": {kind: sorted({str(before[n].dtype) for n in names}) for kind, names in split(before).items()},
        "head_unrounded": all(torch.equal(before[n], stored[n]) for n in head),
        "head_needs_float32": all(not torch.equal(stored[n], stored[n].bfloat16().float()) for n in head),
        "head_moved": {n: (saved[n] - before[n]).abs().max().item() for n in head},
        "exported": same_bytes(exported, saved),
        "restored": same_bytes(restored, saved),
        "continued": same_step(again.step(data(), loss), third) and same_bytes(tensors_of(again), after),
        "schedule_continued": rate(again) == next_rate != third.lr,
        "moved": not same_bytes(after, saved),
        "rates": [s.lr for s in (*steps, third)],
    }


def split(tensors: dict[str, Tensor]) -> dict[str, list[str]]:
    head = [n for n in tensors if n.startswith("score.")]
    return {"head": head, "backbone": [n for n in tensors if n not in head]}


def rate(engine: MegatronEngine) -> float:
    """Of the next step; every group's, the head's among them."""
    (found,) = {group["lr"] for group in engine.optimizer.param_groups}
    return float(found)


def same_step(a: StepResult, b: StepResult) -> bool:
    return (a.loss, a.grad_norm, a.lr) == (b.loss, b.grad_norm, b.lr)


def message(root: Path, fn: Callable[[], object]) -> str:
    """The error of ``fn`` without the folder, told by every rank alike."""
    text = "no error"
    try:
        fn()
    except TempoError as error:
        text = re.sub(re.escape(str(root)), "", str(error))
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return text if set(texts) == {text} else f"the ranks differ: {texts}"


def drop(checkpoint: Path, role: str, key: str) -> Path:
    """A copy of a checkpoint in which a role's weights lack a tensor."""
    target = checkpoint.with_name(f"{checkpoint.name}-without-{role}-{key}")

    def copy() -> None:
        shutil.copytree(checkpoint, target)
        file = target / role / ".metadata"
        metadata = pickle.loads(file.read_bytes())  # written by this process
        kept = {k: v for k, v in metadata.state_dict_metadata.items() if k != key}
        assert len(kept) == len(metadata.state_dict_metadata) - 1
        file.write_bytes(pickle.dumps(replace(metadata, state_dict_metadata=kept)))
        reseal(target)

    on_rank0(copy)
    return target


def heads(root: Path, layout: Layout, groups: ModelParallelGroups) -> dict[str, Any]:
    """A head is missing: in a policy's HF folder, in a policy's checkpoint, in a critic's checkpoint."""
    policy, critic = root / "llama-tied-actor", root / "llama-tied-critic"
    norm, key = "model.layers.2.input_layernorm.weight", "decoder.layers.self_attention.linear_qkv.layer_norm_weight"

    def broken_folder() -> None:
        shutil.copytree(policy, root / "policy-without-norm")
        weights = root / "policy-without-norm" / "model.safetensors"
        tensors = load_file(weights)
        del tensors[norm]
        save_file(tensors, weights, metadata={"format": "pt"})

    on_rank0(broken_folder)
    roles = {role: started(role, root / f"llama-tied-{role}", layout, groups) for role in ("actor", "critic")}
    dirs = {"actor": policy, "critic": critic}
    of_policy = save_checkpoint(root / "run-policy", 1, {"actor": roles["actor"]}, {"step": 1}, dirs, keep=1).folder
    of_both = save_checkpoint(root / "run-both", 1, roles, {"step": 1}, dirs, keep=1).folder
    weights = tensors_of(roles["actor"])

    def fresh(source: Path, init_head: bool = True) -> MegatronEngine:
        return started("critic", source, layout, groups, init_head=init_head)

    def resume(checkpoint: Path) -> None:
        engine = build("critic", critic, layout, groups, init_head=True)
        engine.start_optimizer()
        resume_checkpoint(verify(checkpoint), {"critic": engine})

    def with_fresh_head(source: Path) -> bool:
        engine = fresh(source)
        tensors = tensors_of(engine)
        half = bool((everywhere(engine.forward(data())["values"]).values == 0.5).all())
        return half and same_bytes({n: t for n, t in tensors.items() if not n.startswith("score.")}, weights)

    return {
        "refused": {
            "folder": message(root, lambda: fresh(policy, init_head=False)),
            "checkpoint": message(root, lambda: fresh(of_policy, init_head=False)),
            "folder without norm": message(root, lambda: fresh(root / "policy-without-norm")),
            "checkpoint without norm": message(root, lambda: fresh(drop(of_policy, "actor", key))),
            "critic without head": message(root, lambda: fresh(drop(of_both, "critic", "output_layer.weight"))),
            "resume without bias": message(root, lambda: resume(drop(of_both, "critic", "output_layer.bias"))),
            "resume without moments": message(
                root, lambda: resume(drop(of_both, "critic", "optimizer.state.exp_avg.output_layer.bias"))
            ),
        },
        "whole": message(root, lambda: resume(of_both)),
        "fresh": {"folder": with_fresh_head(policy), "checkpoint": with_fresh_head(of_policy)},
    }


def cases(root: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    world = dist.get_world_size()
    names = [*(t[1] for t in TRAINING[world]), *(r[0] for r in RESUMED[world])]
    for name in dict.fromkeys(names):
        layout = Layout(name)
        groups = ModelParallelGroups(layout.parallel, 60)
        for family, of, tokens in TRAINING[world]:
            if of == name:
                yield "training", f"{name} {family} {tokens}", training(root, family, layout, groups, tokens)
        for of, dtype in RESUMED[world]:
            if of == name:
                yield "resumed", f"{name} {dtype}", resumed(root, layout, dtype, groups)
        if "pp2" in name:
            yield "tied", name, tied(root, layout, groups)
        if name == "pp2":
            yield "heads", name, heads(root, layout, groups)
        groups.close()
    for actor, critic in TWO_LAYOUTS[world]:
        yield "two layouts", f"{actor} + {critic}", two_layouts(root, Layout(actor), Layout(critic))


def main() -> None:
    start(threads=1, timeout_s=60)
    gc.freeze()  # Megatron collects garbage whenever it saves or loads
    root = Path(sys.argv[1])
    for family, role in (("llama-tied", "actor"), ("llama-tied", "critic"), ("olmo3", "critic")):
        save_reference(config_of(family), role, root / f"{family}-{role}")
    for kind, name, result in cases(root):
        if dist.get_rank() == 0:
            print(json.dumps({"kind": kind, "case": name, **result}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
