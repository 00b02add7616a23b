"""Launched by conftest.py on two ranks: a run's checkpoints, and what both ranks say of damaged copies of them.

Argument: an empty folder. ``FOLDER/run/checkpoints`` gets steps 11 and 12 of an actor and a critic that learn in
between, ``FOLDER/frozen`` those of roles that do not always. Each rank writes what it saw to ``FOLDER/rank-R.json``.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.checkpoint.hf_engine import load_initial_weights  # noqa: E402
from tempo_megatron.checkpoint.hf_read import load_hf_config  # noqa: E402
from tempo_megatron.checkpoint.load import read_trainer_state  # noqa: E402
from tempo_megatron.checkpoint.resume import find_resumption  # noqa: E402
from tempo_megatron.checkpoint.run import RunCheckpoints  # noqa: E402
from tempo_megatron.checkpoint.save import RunRecord  # noqa: E402
from tempo_megatron.config.schema import Config  # noqa: E402
from tempo_megatron.errors import TempoError  # noqa: E402
from tempo_megatron.locate import Phase, resolve_init  # noqa: E402
from tempo_megatron.loop.runtime import roles_of  # noqa: E402
from tempo_megatron.parallel.distributed import on_rank0, start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tempo_megatron.training.microbatch import Sequences  # noqa: E402
from tests.checkpoint.damage import flip, shard  # noqa: E402
from tests.checkpoint.hf_models import classifier, policy  # noqa: E402
from tests.model.parity_worker import data  # noqa: E402


def config_of(root: Path, run: str, **changes: Any) -> Config:
    role = {"dtype": "float32", "max_tokens_per_microbatch": 40, "optimizer": {"lr": 0.01, "weight_decay": 0.0}}
    values = {
        "stage": "ppo",
        "output_dir": str(root / run),
        "steps": 20,
        "checkpoint": {"keep": 99},
        "actor": {"init": str(root / "actor"), **role},
        "critic": {"init": str(root / "critic"), **role},
        **changes,
    }
    return Config.model_validate(values)


def engines_of(config: Config, groups: ModelParallelGroups) -> dict[str, MegatronEngine]:
    engines = {}
    for role, settings in roles_of(config).items():
        engine = MegatronEngine(role, settings, load_hf_config(Path(settings.init)), groups, seed=1)
        load_initial_weights(engine, resolve_init(settings.init, f"{role}.init"))
        engine.start_optimizer()
        engines[role] = engine
    return engines


def step(engine: MegatronEngine) -> None:
    def loss(outputs: dict[str, Tensor], rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return next(iter(outputs.values())).sum(), {}

    rows = data().prompts, data().responses.tolist()
    prompts, responses = ([[token % 13 for token in tokens] for tokens in part] for part in rows)
    engine.step(Sequences.of(prompts, responses), loss)


def checkpoints_of(config: Config, engines: Mapping[str, MegatronEngine]) -> RunCheckpoints:
    dirs = {role: Path(settings.init) for role, settings in roles_of(config).items()}
    record = RunRecord("0123", config.model_dump(mode="json"), {})
    return RunCheckpoints(Path(config.output_dir), engines, dirs, config.checkpoint, record)


def unchanged(root: Path, groups: ModelParallelGroups) -> dict[str, list[str]]:
    """Roles whose weights a checkpoint says have not changed although they were updated."""
    config = config_of(root, "frozen")
    engines = engines_of(config, groups)
    checkpoints = checkpoints_of(config, engines)
    found = {}

    def save(at: int, name: str, *moved: str) -> None:
        checkpoints.save({"step": at, "moved": moved})
        checkpoints.drain()
        found[name] = checkpoints.unchanged

    save(1, "first", "actor", "critic")
    save(2, "no update")
    save(3, "updates without effect", "actor", "critic")
    engines["actor"].lr_scale = 0.0
    step(engines["actor"])
    save(4, "Adam's moments alone", "actor")
    engines["actor"].lr_scale = 1.0
    step(engines["critic"])
    save(5, "critic-only steps", "critic")
    step(engines["actor"])
    save(6, "actor alone", "actor")
    checkpoints.go_back(5)
    found["of the checkpoint gone back to"] = checkpoints.unchanged
    save(7, "went back")
    checkpoints.go_back(4)
    save(8, "went back and was to learn", "actor")
    return found


def within_a_step(root: Path, groups: ModelParallelGroups) -> list[dict[str, Any]]:
    """After each save, what is in the folder, and what this rank would go on with."""
    config = config_of(root, "within", checkpoint={"keep": 1, "asynchronous": False})
    checkpoints = checkpoints_of(config, engines_of(config, groups))
    rank = dist.get_rank()
    table = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    found = []

    def save(
        step: int, phase: Phase | None = None, rows: Mapping[str, Tensor] | None = None, protected: Any = ()
    ) -> None:
        folder = checkpoints.save({"step": step, "moved": [], "at": phase}, protected, phase=phase, rows=rows)
        whole = find_resumption(config, roles_of(config), {"data.train_files": {}, "data.oracle_files": {}})
        assert whole is not None
        found.append(
            {
                "saved": folder.name,
                "there": sorted(path.name for path in folder.parent.iterdir()),
                "goes on from": whole.checkpoint.folder.name,
                "state": read_trainer_state(folder)["at"],
                "init": resolve_init(config.output_dir, "actor.init").path.name,
                "rows": [[r, {k: v.tolist() for k, v in t.items()}] for r, t in checkpoints.rows(whole.checkpoint)],
            }
        )

    save(1)
    save(1, "rollout", {"tokens": table + rank, "view of it": (table + rank)[:, 1]})
    save(1, "rollout", {"tokens": table[:rank] + 7})
    save(1, "mstep", {} if rank else {"x": torch.tensor([True])}, protected={1})
    save(2, protected={1})
    save(2, "estep")
    save(3)
    return found


def told(fn: Callable[[], Any]) -> Any:
    try:
        return fn()
    except TempoError as error:
        return f"{type(error).__name__}: {error}"


def resumption(config: Config) -> Any:
    found = find_resumption(config, roles_of(config), {"data.train_files": {}, "data.oracle_files": {}})
    return None if found is None else [str(found.checkpoint.folder), found.notes()]


def copy_of_run(root: Path, name: str, damage: Callable[[Path], None]) -> None:
    shutil.copytree(root / "run", root / name)
    damage(root / name / "checkpoints")


def damaged(root: Path, groups: ModelParallelGroups) -> dict[str, Any]:
    """What each rank says of copies of the run."""

    def newest(at: Path) -> None:
        flip(shard(at / "step_00000012", "critic", 1))

    def both(at: Path) -> None:
        newest(at)
        (at / "step_00000011" / "state.json").unlink()

    def init(at: Path) -> None:
        flip(shard(at / "step_00000012", "actor", 0))

    for name, damage in (("newest", newest), ("both", both), ("init", init)):
        on_rank0(partial(copy_of_run, root, name, damage))
    checkpoint = root / "newest" / "checkpoints" / "step_00000012"
    actor_from = config_of(root, "x", actor={"init": str(root / "init"), "dtype": "float32"})

    def load() -> str:
        source = resolve_init(actor_from.actor.init, "actor.init")
        engine = MegatronEngine("actor", actor_from.actor, load_hf_config(source.hf_dir), groups, seed=1)
        load_initial_weights(engine, source)
        return "loaded"

    return {
        "whole": told(lambda: resumption(config_of(root, "run"))),
        "both": told(lambda: resumption(config_of(root, "both"))),
        "named": told(lambda: resumption(config_of(root, "elsewhere", resume=str(checkpoint)))),
        "other settings": told(lambda: resumption(config_of(root, "newest", seed=5))),
        "never": told(lambda: resumption(config_of(root, "run", resume="never"))),
        "none": told(lambda: resumption(config_of(root, "new"))),
        "init": told(load),
        "newest": told(lambda: resumption(config_of(root, "newest"))),
    }


def write_models(root: Path) -> None:
    policy("qwen3").save_pretrained(root / "actor")
    classifier("qwen3").save_pretrained(root / "critic")


def main() -> None:
    start(threads=1, timeout_s=60)
    root = Path(sys.argv[1])
    torch.manual_seed(0)

    on_rank0(partial(write_models, root))
    config = config_of(root, "run")
    groups = ModelParallelGroups(config.actor.parallel, 60)
    engines = engines_of(config, groups)
    checkpoints = checkpoints_of(config, engines)
    for at in (11, 12):
        for engine in engines.values():
            step(engine)
        checkpoints.save({"step": at, "moved": [*engines], "collector": {"at": at}})
    checkpoints.drain()
    result = {
        "unchanged": unchanged(root, groups),
        "told": damaged(root, groups),
        "clean": checkpoints.unchanged,
        "within": within_a_step(root, groups),
    }
    (root / f"rank-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
