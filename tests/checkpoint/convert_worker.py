"""Launched by test_convert_train.py on 2 ranks: what `train` does with converted checkpoints.

Arguments: a folder, then cases ``NAME:ROLE:LAYOUT``. Loads ``FOLDER/there/NAME`` into the layout, compares with the HF
folder ``FOLDER/hf/NAME``, and saves a checkpoint with optimizer state into the run folder ``FOLDER/run/NAME``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.checkpoint.critic_format import open_hf_folder  # noqa: E402
from tempo_megatron.checkpoint.hf_read import load_hf_config  # noqa: E402
from tempo_megatron.checkpoint.load import load_weights  # noqa: E402
from tempo_megatron.checkpoint.verify import verify  # noqa: E402
from tempo_megatron.config.schema import CriticConfig, ParallelConfig, RoleConfig  # noqa: E402
from tempo_megatron.locate import resolve_init  # noqa: E402
from tempo_megatron.parallel.distributed import rank, start  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tests.checkpoint.saving import save_checkpoint  # noqa: E402

LAYOUTS = {
    "dp2": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2vpp2": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "pp2first1": ParallelConfig(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=1),
    "ep2": ParallelConfig(expert_model_parallel_size=2),
}


def case(folder: Path, name: str, role: str, layout: str) -> None:
    source = resolve_init(str(folder / "there" / name), f"{role}.init")
    assert (source.kind, source.path) == ("checkpoint", folder / "there" / name)
    parallel = LAYOUTS[layout]
    kind = CriticConfig if role == "critic" else RoleConfig
    role_config = kind(init="-", dtype="float32", layer_spec="torch", parallel=parallel)
    groups = ModelParallelGroups(parallel, 60)
    engine = MegatronEngine(role, role_config, load_hf_config(source.hf_dir), groups, seed=1)
    load_weights(verify(source.path), engine, init_head=False)
    read = open_hf_folder(folder / "hf" / name, role)
    found = dict(engine.weight_stream(1))
    assert found.keys() == read.names
    assert all(torch.equal(tensor, read(key)) for key, tensor in found.items())
    engine.start_optimizer()
    save_checkpoint(folder / "run" / name, 1, {role: engine}, {}, {role: source.hf_dir}, keep=1)
    if rank() == 0:
        print(f"loaded {name}", flush=True)


def main() -> None:
    start(threads=1, timeout_s=60)
    for argument in sys.argv[2:]:
        case(Path(sys.argv[1]), *argument.split(":"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
