"""Roles saved under one layout and loaded under another; launched by test_reshard.py.

Argument: a folder for models and checkpoints.  Prints one JSON line per loading from rank 0.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from megatron.core import dist_checkpointing  # noqa: E402

from tempo_megatron.checkpoint.hf_engine import export_hf, load_initial_weights  # noqa: E402
from tempo_megatron.checkpoint.hf_read import load_hf_config  # noqa: E402
from tempo_megatron.checkpoint.load import check_resumable, resume_checkpoint  # noqa: E402
from tempo_megatron.checkpoint.manifest import read_manifest  # noqa: E402
from tempo_megatron.checkpoint.save import save_checkpoint  # noqa: E402
from tempo_megatron.checkpoint.verify import verify  # noqa: E402
from tempo_megatron.config.schema import CriticConfig, OptimizerConfig, RoleConfig  # noqa: E402
from tempo_megatron.errors import TempoError  # noqa: E402
from tempo_megatron.locate import InitSource  # noqa: E402
from tempo_megatron.model.hf_tensors import Role  # noqa: E402
from tempo_megatron.parallel.distributed import start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine, StepResult  # noqa: E402
from tests.checkpoint.hf_models import same_tensors, stored  # noqa: E402
from tests.model.hf_reference import data, save_reference, weight_of  # noqa: E402
from tests.model.parity_cases import Layout, config_of  # noqa: E402
from tests.model.parity_worker import relative  # noqa: E402

BUCKET_MIB = 1


@dataclass(frozen=True)
class Chain:
    """A role that is trained under the first layout, then saved under each and loaded under the next."""

    family: str
    role: Role
    dtype: str
    distributed: bool
    layouts: tuple[str, ...]

    @property
    def model(self) -> str:
        return f"{self.family}-{self.role}"

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype} {'distributed' if self.distributed else 'plain'}"


#: One KV head of two ranks; stages of 3 and 2 layers, of 1 and 4, of 3 and 2 in two chunks each.
UNEVEN = ("tp2 sp", "pp2", "pp2 first1", "pp2 vpp2", "tp2")
CHAINS = [
    Chain("llama-tied", "critic", "float32", True, ("tp2 sp", "pp2 vpp2", "cp2", "", "cp2", "pp2 vpp2", "tp2 sp")),
    Chain("llama-tied", "critic", "bfloat16", True, ("", "pp2 vpp2", "tp2 sp")),
    Chain("llama-tied", "critic", "bfloat16", False, ("tp2", "pp2 vpp2", "")),
    Chain("qwen3-moe", "actor", "float32", True, ("ep2", "", "tp2 sp etp2", "pp2 vpp2", "cp2 ep2", "tp2 sp ep2")),
    Chain("qwen3-moe", "actor", "float32", False, ("ep2", "", "ep2")),
    Chain("qwen2", "actor", "float32", True, tuple(f"{name} kv1 layers5" for name in UNEVEN)),
]


@contextmanager
def engine_under(chain: Chain, layout: str, folder: Path) -> Iterator[MegatronEngine]:
    """A role without weights; the groups of its layout are gone afterwards, and with them their threads."""
    parallel = Layout(layout).parallel
    groups = ModelParallelGroups(parallel, 60)
    config = (RoleConfig if chain.role == "actor" else CriticConfig)(
        init=str(folder),
        dtype=chain.dtype,
        parallel=parallel,
        max_tokens_per_microbatch=40,
        # epsilon: so large that a step tells the gradient, not only its sign
        optimizer=OptimizerConfig(
            lr=0.01, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1, distributed=chain.distributed, warmup_steps=4
        ),
    )
    yield MegatronEngine(chain.role, config, load_hf_config(folder), groups, seed=1)
    groups.close()


def step(engine: MegatronEngine) -> StepResult:
    key = "log_probs" if engine.role == "actor" else "values"

    def loss(tables: dict[str, Tensor], rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        weights = torch.tensor([[weight_of(r, t) for t in range(tables[key].shape[1])] for r in rows])
        return (tables[key] * weights).sum() / 40, {}

    return engine.step(data(), loss)


def tensors_of(engine: MegatronEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.weight_stream(BUCKET_MIB)}


def state(folder: Path, vocabulary: int) -> dict[str, Tensor]:
    """Weights, float32 masters and moments of a role in a checkpoint, whatever its layout."""
    found = dist_checkpointing.load_plain_tensors(str(folder))
    # a layout pads the vocabulary to a multiple of its TP size; what is no tensor are the groups' settings
    return {
        name: tensor[:vocabulary] if re.search(r"word_embeddings|output_layer", name) else tensor
        for name, tensor in found.items()
        if isinstance(tensor, Tensor)
    }


def refused(checkpoint: Path, role: Role, config: RoleConfig) -> str:
    try:
        check_resumable(checkpoint, read_manifest(checkpoint), {role: config}, "tempo", dist.get_world_size())
    except TempoError as error:
        return str(error).removeprefix(f"{checkpoint}: ")
    return "accepted"


def other_kinds(checkpoint: Path, role: Role, config: RoleConfig) -> dict[str, str]:
    """What a run is told whose optimizer keeps its state in another form."""
    optimizer = config.optimizer.model_copy(update={"distributed": not config.optimizer.distributed})
    dtype = "bfloat16" if config.dtype == "float32" else "float32"
    changes = {"distributed": {"optimizer": optimizer}, "dtype": {"dtype": dtype}}
    return {kind: refused(checkpoint, role, config.model_copy(update=change)) for kind, change in changes.items()}


def hops(root: Path, chain: Chain) -> Iterator[dict[str, Any]]:
    folder, run, role = root / chain.model, root / chain.name.replace(" ", "-"), chain.role
    vocabulary = config_of(chain.family).vocab_size

    def keep(engine: MegatronEngine, at: int) -> Path:
        export_hf(engine, folder, run / f"hf-{at}", BUCKET_MIB)
        return save_checkpoint(run, at, {role: engine}, {"step": at}, {role: folder}, keep=99).folder

    with engine_under(chain, chain.layouts[0], folder) as engine:
        load_initial_weights(engine, InitSource("hf", folder, folder))
        engine.start_optimizer()
        step(engine)
        step(engine)
        checkpoint = keep(engine, 0)
        before = tensors_of(engine)
        third = step(engine)
        after = tensors_of(engine)
    want, exported = state(checkpoint / role, vocabulary), stored(run / "hf-0")
    for at, (source, target) in enumerate(pairwise(chain.layouts), 1):
        with engine_under(chain, target, folder) as engine:
            engine.start_optimizer()
            check_resumable(
                checkpoint, read_manifest(checkpoint), {role: engine.config}, "tempo", dist.get_world_size()
            )
            resume_checkpoint(verify(checkpoint), {role: engine})
            last, checkpoint = checkpoint, keep(engine, at)
            result = step(engine)
            moved = tensors_of(engine)
            load_initial_weights(engine, InitSource("checkpoint", last, folder))  # weights alone
            weights_alone = same_tensors(tensors_of(engine), before)
            kinds = other_kinds(checkpoint, role, engine.config)
        got = state(checkpoint / role, vocabulary)
        yield {
            "role": role,
            "dtype": chain.dtype,
            "distributed": chain.distributed,
            "case": f"{chain.name}: {source or 'dp2'} -> {target or 'dp2'}",
            "moments": sum(name.startswith("optimizer.state.exp_avg.") for name in got),
            "same_state": same_tensors(got, want),
            "same_folder": same_tensors(stored(run / f"hf-{at}"), exported),
            "weights_alone": weights_alone,
            "other_kinds": kinds,
            "lr": result.lr - third.lr,
            "loss": abs(result.loss - third.loss) / abs(third.loss),
            "grad_norm": abs(result.grad_norm - third.grad_norm) / third.grad_norm,
            "step": max(relative(moved[n] - before[n], after[n] - before[n]) for n in before),
        }


def main() -> None:
    start(threads=1, timeout_s=60)
    root = Path(sys.argv[1])
    gc.freeze()  # Megatron collects garbage whenever it saves or loads
    for chain in CHAINS:
        config = config_of(chain.family, **Layout(chain.layouts[0]).model_changes)
        save_reference(config, chain.role, root / chain.model)
    for chain in CHAINS:
        for line in hops(root, chain):
            if dist.get_rank() == 0:
                print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
