"""Launched by test_asynchronous.py on two ranks: saves whose writing is held up while the engines train and move.

Argument: an empty folder. Each rank writes what it saw to ``FOLDER/rank-R.json``.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from megatron.core import dist_checkpointing  # noqa: E402

from tempo_megatron.checkpoint.manifest import find_whole  # noqa: E402
from tempo_megatron.checkpoint.run import RunCheckpoints  # noqa: E402
from tempo_megatron.checkpoint.save import CheckpointSave  # noqa: E402
from tempo_megatron.errors import TempoError  # noqa: E402
from tempo_megatron.loop.runtime import roles_of  # noqa: E402
from tempo_megatron.parallel.distributed import gather_objects, on_rank0, start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tests.checkpoint.hf_models import same_tensors  # noqa: E402
from tests.checkpoint.saved_run_worker import (  # noqa: E402
    checkpoints_of,
    config_of,
    engines_of,
    step,
    write_models,
)

Engines = dict[str, MegatronEngine]


@contextmanager
def held_up() -> Iterator[Callable[[], None]]:
    """No write begins before what is given is called."""
    gate, write = threading.Event(), CheckpointSave.write

    def wait_and_write(save: CheckpointSave) -> None:
        gate.wait(60)
        write(save)

    CheckpointSave.write = wait_and_write  # type: ignore[method-assign]
    try:
        yield gate.set
    finally:
        CheckpointSave.write = write  # type: ignore[method-assign]


def contents(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: weights, float32 masters and moments of its roles. Collective."""
    return {
        f"{role} {name}": tensor
        for role in ("actor", "critic")
        for name, tensor in dist_checkpointing.load_plain_tensors(str(folder / role)).items()
        if isinstance(tensor, Tensor)
    }


def disturb(engines: Engines) -> None:
    """Everything that a save wrote from is overwritten, and its memory given back and taken anew."""
    for engine in engines.values():
        step(engine)
        saved = [part.state for part in (engine.parts.weights, engine.parts.optimizer)]
        before = [tensor.clone() for tensor in _live(engine)]
        for tensor in _live(engine):
            tensor.fill_(float("nan"))
        for part in engine.parts:
            part.sleep()
        for part in engine.parts:
            part.wake()
        for tensor, old in zip(_live(engine), before, strict=True):
            tensor.copy_(old)
        assert saved == [part.state for part in (engine.parts.weights, engine.parts.optimizer)]


@torch.no_grad()
def _live(engine: MegatronEngine) -> list[Tensor]:
    weights = [parameter.data for model in engine.models for parameter in model.parameters()]
    states = [t for t in engine.parts._optimizer_tensors() if isinstance(t, Tensor) and t.is_floating_point()]
    return weights + [tensor.data for tensor in states]


def snapshots(root: Path, groups: ModelParallelGroups) -> dict[str, Any]:
    """Every checkpoint against one that was saved synchronously at the same point."""
    config = config_of(root, "held", actor={"init": str(root / "actor"), "dtype": "bfloat16", **LEARNING})
    config.critic.optimizer.distributed = False
    waiting = config_of(root, "waiting", checkpoint={"asynchronous": False, "keep": 99})
    engines = engines_of(config, groups)
    held, plain = checkpoints_of(config, engines), checkpoints_of(waiting, engines)
    same, figures, in_flight, last = [], [], [], None
    for at in range(1, 4):
        for engine in engines.values():
            step(engine)
        state = {"step": at, "moved": [*engines]}
        rows = {"tokens": torch.full((3,), at)}
        wanted = plain.save(state)
        with held_up() as go_on:
            folder = held.save(state, rows=rows)
            rows["tokens"].zero_()
            torch.rand(7)  # another random state
            disturb(engines)
            held.poll()
            in_flight.append(held.in_flight and not folder.exists())
            go_on()
            held.drain()
        whole = find_whole(folder)
        tensors, want = contents(folder), contents(wanted)
        same.append(
            {
                "as synchronous": same_tensors(tensors, want),
                "as the one before": last is not None and bool(same_among(tensors, last)),
                "weights' digests": whole.manifest.weights == find_whole(wanted).manifest.weights,
                "rows": held.rows(whole)[0][1]["tokens"].tolist(),
                "other files": [
                    (folder / name).read_bytes() == (wanted / name).read_bytes()
                    for name in ("state.json", f"rng/rank_{dist.get_rank()}.safetensors", "hf/config.json")
                ],
            }
        )
        figures.append(
            {
                "figures": sorted(numbers := held.figures()),
                "staged": sum(gather_objects(round(numbers["checkpoint/staged_gib"] * 2**30))),
                "stored": sum(tensor.nbytes for tensor in tensors.values()),
            }
        )
        last = tensors
    return {"same": same, "figures": figures, "in flight": in_flight, "unchanged": held.unchanged}


def same_among(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of weights and states that are equal in both, but for those that are constant."""
    return [name for name in a if torch.equal(a[name], b[name]) and a[name].unique().numel() > 1]


def told(fn: Callable[[], Any]) -> str:
    try:
        fn()
    except TempoError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failures(root: Path, groups: ModelParallelGroups) -> dict[str, Any]:
    """A disk that is full for one rank, a folder that is lost, and a process that ends in between."""
    config = config_of(root, "failing")
    engines = engines_of(config, groups)
    checkpoints = checkpoints_of(config, engines)
    found: dict[str, Any] = {}
    at = Path(config.output_dir) / "checkpoints"

    def save(number: int) -> None:
        for engine in engines.values():
            step(engine)
        checkpoints.save({"step": number, "moved": [*engines]})

    def look(name: str) -> None:
        dist.barrier()
        found[name] = sorted(path.name for path in at.iterdir())
        dist.barrier()

    save(1)
    checkpoints.drain()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    save(2)
    found["full"] = told(partial(until_committed, checkpoints))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    look("after a full disk")
    save(3)
    checkpoints.drain()
    look("and then")

    def lost() -> None:
        raise TempoError("the claim is gone")

    checkpoints._check = lost
    save(4)
    found["lost"] = told(checkpoints.drain)
    look("after the loss")
    checkpoints._check = lambda: None
    save(5)
    checkpoints.close()
    look("after the end")
    checkpoints.go_back(3)
    save(6)
    checkpoints.go_back(6)  # which is drained first
    look("after going back")
    return found


def until_committed(checkpoints: RunCheckpoints) -> None:
    while checkpoints.in_flight:
        checkpoints.poll()


LEARNING = {"max_tokens_per_microbatch": 40, "optimizer": {"lr": 0.01, "weight_decay": 0.0}}


def main() -> None:
    start(threads=1, timeout_s=60)
    root = Path(sys.argv[1])
    torch.manual_seed(0)
    on_rank0(partial(write_models, root))
    config = config_of(root, "run")
    assert sorted(roles_of(config)) == ["actor", "critic"]
    groups = ModelParallelGroups(config.actor.parallel, 60)
    result = {"snapshots": snapshots(root, groups), "failures": failures(root, groups)}
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    (root / f"rank-{dist.get_rank()}.json").write_text(json.dumps({**result, "threads": threads}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
