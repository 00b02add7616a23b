"""Launched by test_hf_engine.py: roles are loaded from HF folders, checkpointed and written as HF folders.

Rank 0 makes the folders below the one that is given; prints one JSON line per rank.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.checkpoint.hf_engine import export_hf, load_initial_weights  # noqa: E402
from tempo_megatron.checkpoint.hf_read import load_hf_config  # noqa: E402
from tempo_megatron.config.schema import CriticConfig, OptimizerConfig, ParallelConfig, RoleConfig  # noqa: E402
from tempo_megatron.errors import TempoError  # noqa: E402
from tempo_megatron.locate import InitSource  # noqa: E402
from tempo_megatron.parallel.distributed import start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tests.checkpoint.hf_models import FAMILIES, classifier, policy, rewrite, v_head_folder  # noqa: E402
from tests.checkpoint.saving import save_checkpoint  # noqa: E402

BUCKET_MIB = 1


def make_folders(root: Path) -> None:
    for family in FAMILIES:
        policy(family).save_pretrained(root / f"{family}-actor")
        classifier(family).save_pretrained(root / f"{family}-score")
        v_head_folder(family, root / f"{family}-v_head")
    shutil.copytree(root / "qwen3-score", root / "wrong-shape")
    rewrite(root / "wrong-shape" / "model.safetensors", model__norm__weight=torch.ones(15))


def loaded(folder: Path, groups: ModelParallelGroups, parallel: ParallelConfig) -> MegatronEngine:
    role = "actor" if folder.name.endswith("actor") else "critic"
    config = (RoleConfig if role == "actor" else CriticConfig)(
        init=str(folder), dtype="float32", parallel=parallel, optimizer=OptimizerConfig(lr=1e-3)
    )
    engine = MegatronEngine(role, config, load_hf_config(folder), groups, seed=1)
    load_initial_weights(engine, InitSource("hf", folder, folder))
    return engine


def message(fn: Callable[[], object]) -> str:
    try:
        fn()
    except TempoError as error:
        return str(error)
    return "no error"


def main() -> None:
    start(threads=1, timeout_s=60)
    root = Path(sys.argv[1])
    if dist.get_rank() == 0:
        make_folders(root)
    dist.barrier()
    parallel = ParallelConfig(pipeline_model_parallel_size=dist.get_world_size())
    groups = ModelParallelGroups(parallel, 60)
    for family in FAMILIES:
        for name in ("actor", "score", "v_head"):
            folder = root / f"{family}-{name}"
            engine = loaded(folder, groups, parallel)
            form = None if name == "actor" else name
            export_hf(engine, folder, root / "out" / folder.name, BUCKET_MIB, form)
            if folder.name == "qwen3-v_head":
                engine.start_optimizer()
                save_checkpoint(root / "run", 1, {"critic": engine}, {"step": 1}, {"critic": folder}, keep=1)
                (root / "file").touch()
                unwritable = message(lambda: export_hf(engine, folder, root / "file" / "out", BUCKET_MIB))  # noqa: B023
    errors = {"load": message(lambda: loaded(root / "wrong-shape", groups, parallel)), "export": unwritable}
    print(json.dumps(errors), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
