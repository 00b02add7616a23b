"""Roles saved under one layout and loaded under another; launched by test_reshard.py, once for each of ``WORLDS``.

Arguments: a folder for models and checkpoints; which of the launches this is.  Prints one JSON line per loading from
rank 0.
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
from tempo_megatron.checkpoint.manifest import checkpoint_folder, read_manifest  # noqa: E402
from tempo_megatron.checkpoint.verify import verify  # noqa: E402
from tempo_megatron.config.schema import CriticConfig, OptimizerConfig, RoleConfig  # noqa: E402
from tempo_megatron.errors import TempoError  # noqa: E402
from tempo_megatron.locate import InitSource, Position  # noqa: E402
from tempo_megatron.model.hf_tensors import Role  # noqa: E402
from tempo_megatron.parallel.distributed import start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine, StepResult  # noqa: E402
from tests.checkpoint.hf_models import same_tensors, stored  # noqa: E402
from tests.checkpoint.reshard_cases import CHAINS, WORLDS, Chain  # noqa: E402
from tests.checkpoint.saving import save_checkpoint  # noqa: E402
from tests.model.hf_reference import data, save_reference, weight_of  # noqa: E402
from tests.model.parity_cases import Layout, config_of  # noqa: E402
from tests.model.parity_worker import relative  # noqa: E402

BUCKET_MIB = 1


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
        check_resumable(checkpoint, read_manifest(checkpoint), {role: config}, "tempo")
    except TempoError as error:
        return str(error).removeprefix(f"{checkpoint}: ")
    return "accepted"


def other_kinds(checkpoint: Path, role: Role, config: RoleConfig) -> dict[str, str]:
    """What a run is told whose optimizer keeps its state in another form."""
    optimizer = config.optimizer.model_copy(update={"distributed": not config.optimizer.distributed})
    dtype = "bfloat16" if config.dtype == "float32" else "float32"
    changes = {"distributed": {"optimizer": optimizer}, "dtype": {"dtype": dtype}}
    return {kind: refused(checkpoint, role, config.model_copy(update=change)) for kind, change in changes.items()}


@dataclass(frozen=True)
class Reference:
    """What the run does that goes on under its own layout.

    Attributes:
        weights: HF tensors where it was saved, and after each of two further steps.
        results: of the two steps.
    """

    weights: list[dict[str, Tensor]]
    results: list[StepResult]


def run_of(root: Path, chain: Chain) -> Path:
    return root / chain.name.replace(" ", "-")


def keep(engine: MegatronEngine, root: Path, chain: Chain, at: int) -> Path:
    """Checkpoint number ``at`` of the chain; the same weights as an HF folder too."""
    folder, run = root / chain.model, run_of(root, chain)
    export_hf(engine, folder, run / f"hf-{at}", BUCKET_MIB)
    return save_checkpoint(run, at, {chain.role: engine}, {"step": at}, {chain.role: folder}, keep=99).folder


def begin(root: Path, chain: Chain) -> None:
    """Checkpoint 0 and ``reference.pt``."""
    layout, folder = chain.layouts[0][0], root / chain.model
    with engine_under(chain, layout, folder) as engine:
        load_initial_weights(engine, InitSource("hf", folder, folder))
        engine.start_optimizer()
        step(engine)
        step(engine)
        keep(engine, root, chain, 0)
        reference = Reference([tensors_of(engine)], [])
        for _ in range(2):
            reference.results.append(step(engine))
            reference.weights.append(tensors_of(engine))
    if dist.get_rank() == 0:
        torch.save(reference, run_of(root, chain) / "reference.pt")
    dist.barrier()


def moved_otherwise(weights: dict[str, Tensor], want: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Largest difference of a tensor's move since ``start``, of that move."""
    return max(relative(weights[n] - start[n], want[n] - start[n]) for n in start)


def hop(root: Path, chain: Chain, target: str, at: int) -> dict[str, Any]:
    """Checkpoint ``at - 1`` goes on under layout ``target`` and becomes checkpoint ``at``."""
    folder, run, role = root / chain.model, run_of(root, chain), chain.role
    vocabulary = config_of(chain.family).vocab_size
    reference: Reference = torch.load(run / "reference.pt", weights_only=False)
    last = checkpoint_folder(run, Position(at - 1))
    losses, norms, moves = [], [], []
    with engine_under(chain, target, folder) as engine:
        engine.start_optimizer()
        check_resumable(last, read_manifest(last), {role: engine.config}, "tempo")
        resume_checkpoint(verify(last), {role: engine})
        checkpoint = keep(engine, root, chain, at)
        for want, weights in zip(reference.results, reference.weights[1:], strict=True):
            result = step(engine)
            losses.append(abs(result.loss - want.loss) / abs(want.loss))
            norms.append(abs(result.grad_norm - want.grad_norm) / want.grad_norm)
            moves.append(moved_otherwise(tensors_of(engine), weights, reference.weights[0]))
            assert result.lr == want.lr
        load_initial_weights(engine, InitSource("checkpoint", last, folder))  # weights alone
        weights_alone = same_tensors(tensors_of(engine), reference.weights[0])
        kinds = other_kinds(checkpoint, role, engine.config)
    got = state(checkpoint / role, vocabulary)
    return {
        "role": role,
        "dtype": chain.dtype,
        "distributed": chain.distributed,
        "moments": sum(name.startswith("optimizer.state.exp_avg.") for name in got),
        "same_state": same_tensors(got, state(checkpoint_folder(run, Position(0)) / role, vocabulary)),
        "same_folder": same_tensors(stored(run / f"hf-{at}"), stored(run / "hf-0")),
        "weights_alone": weights_alone,
        "other_kinds": kinds,
        "loss": max(losses),
        "grad_norm": max(norms),
        "step": max(moves),
    }


def main() -> None:
    start(threads=1, timeout_s=60)
    root, launch = Path(sys.argv[1]), int(sys.argv[2])
    gc.freeze()  # Megatron collects garbage whenever it saves or loads
    if launch == 0:
        for chain in CHAINS:
            config = config_of(chain.family, **Layout(chain.layouts[0][0]).model_changes)
            save_reference(config, chain.role, root / chain.model)
    for chain in CHAINS:
        if launch == 0:
            begin(root, chain)
        places = [(number, layout) for number, layouts in enumerate(chain.layouts) for layout in layouts]
        for at, ((before, source), (number, target)) in enumerate(pairwise(places), 1):
            if number == launch:
                line = hop(root, chain, target, at)
                line["case"] = f"{chain.name}: {source} on {WORLDS[before]} -> {target} on {WORLDS[number]}"
                if dist.get_rank() == 0:
                    print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
