"""Launched by test_own_state.py on four ranks: optimizer states in rectangles beside Megatron's own way with them.

Argument: an empty folder. Each rank writes what it saw to ``FOLDER/rank-R.json``.
"""

from __future__ import annotations

import gc
import json
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.mapping import is_main_replica  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

from tempo_megatron.checkpoint.hf_engine import load_initial_weights  # noqa: E402
from tempo_megatron.checkpoint.megatron_state import RoleSave, load_role, plan_role  # noqa: E402
from tempo_megatron.errors import TempoError  # noqa: E402
from tempo_megatron.locate import InitSource  # noqa: E402
from tempo_megatron.parallel.distributed import on_rank0, start  # noqa: E402
from tempo_megatron.parallel.storage import give_back_freed  # noqa: E402
from tempo_megatron.patching import kept, replace_function  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tests.checkpoint.convert_memory_worker import peak_gib  # noqa: E402
from tests.checkpoint.hf_models import same_tensors  # noqa: E402
from tests.checkpoint.reshard_cases import Chain  # noqa: E402
from tests.checkpoint.reshard_worker import engine_under, step  # noqa: E402
from tests.model.hf_reference import save_reference  # noqa: E402
from tests.model.parity_cases import Layout, config_of  # noqa: E402

REPLACED = {
    "sharded_param_state_fully_reshardable": ("self", "model_sharded_state_dict", "is_loading", "metadata"),
    "load_parameter_state_from_fully_reshardable": ("self", "state_dict"),
}
#: A bfloat16 critic has a float32 head; experts in groups of their own; copied KV heads, uneven stages, biases.
CASES = (
    Chain("llama-tied", "critic", "bfloat16", True, (("tp2 sp",),)),
    Chain("qwen3-moe", "actor", "bfloat16", True, (("tp2 sp ep2",),)),
    Chain("qwen3-moe", "actor", "float32", True, (("pp2 ep2",),)),
    Chain("qwen2", "actor", "bfloat16", True, (("tp2 pp2 vpp2 sp kv1 layers5",),)),
)


@contextmanager
def megatrons_own() -> Iterator[None]:
    """Whole parameters, gathered on every rank, as Megatron has it."""
    with ExitStack() as stack:
        for name, parameters in REPLACED.items():
            stack.enter_context(kept(DistributedOptimizer, name))
            ours = getattr(DistributedOptimizer, name)
            setattr(DistributedOptimizer, name, replace_function(DistributedOptimizer, name, ours, parameters))
        yield


def save(engine: MegatronEngine, folder: Path) -> None:
    role = plan_role(engine, folder)
    role.write(threading.Event())
    role.finish()


def held(engine: MegatronEngine) -> list[Tensor]:
    """Weights, masters and moments of this rank, and the numbers beside them."""
    weights = [parameter.data for model in engine.models for parameter in model.parameters()]
    states = [tensor.data for tensor in engine.parts._optimizer_tensors()]
    steps = [torch.tensor(float(group["step"])) for group in engine.optimizer.param_groups]
    return [tensor.clone() for tensor in (*weights, *states, *steps)]


def plain(folder: Path) -> dict[str, Tensor]:
    found = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def fresh(chain: Chain, folder: Path) -> Any:
    return engine_under(chain, chain.layouts[0][0], folder)


def both_ways(root: Path, chain: Chain) -> dict[str, Any]:
    """Saved by Megatron and by us, and each loaded by the other."""
    model, at = root / chain.model, root / chain.name.replace(" ", "-")
    save_reference(config_of(chain.family, **Layout(chain.layouts[0][0]).model_changes), chain.role, model)
    on_rank0(at.mkdir)
    found: dict[str, Any] = {"case": chain.name}
    with fresh(chain, model) as engine:
        load_initial_weights(engine, InitSource("hf", model, model))
        engine.start_optimizer()
        step(engine)
        step(engine)
        with megatrons_own():
            save(engine, at / "old")
        save(engine, at / "new")
        save(engine, at / "again")
        before = held(engine)
    old, new = plain(at / "old"), plain(at / "new")
    found["moments"] = sum(name.startswith("optimizer.state.exp_avg.") for name in new)
    found["same tensors"] = same_tensors(old, new)
    found["same bytes"] = on_rank0(lambda: same_files(at / "new", at / "again"))
    with fresh(chain, model) as engine:
        engine.start_optimizer()
        load_role(engine, at / "old", optimizer=True)
        found["old loaded"] = all(map(torch.equal, held(engine), before))
    with fresh(chain, model) as engine, megatrons_own():
        engine.start_optimizer()
        load_role(engine, at / "new", optimizer=True)
        found["new loaded by Megatron"] = all(map(torch.equal, held(engine), before))
    if chain.dtype == "bfloat16":  # the master is the weight's own memory then, and must be what stays
        with fresh(replace(chain, dtype="float32"), model) as engine:
            engine.start_optimizer()
            load_role(engine, at / "old", optimizer=True)
            save(engine, at / "float32")
        wanted = {name: tensor for name, tensor in old.items() if name.startswith("optimizer.")}
        found["masters of a float32 role"] = same_tensors({n: plain(at / "float32")[n] for n in wanted}, wanted)
    return found


def same_files(one: Path, other: Path) -> bool:
    """But for metadata, which has a number of its own for each save."""
    names = sorted(path.name for path in one.iterdir() if path.name != ".metadata")
    there = sorted(path.name for path in other.iterdir() if path.name != ".metadata")
    return names == there and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


# ---------------------------------------------------------------- faults


def told(fn: Callable[[], Any]) -> str:
    try:
        fn()
    except TempoError as error:
        return str(error)
    return "nothing"


@contextmanager
def tampered(change: Callable[[dict[int, Any]], None]) -> Iterator[None]:
    """Rank 1 saves other rectangles than it has of the first moment that is its to save."""
    ours = DistributedOptimizer.sharded_param_state_fully_reshardable

    def rectangles(*args: Any, **kwargs: Any) -> Any:
        found = ours(*args, **kwargs)
        if dist.get_rank() == 1:
            change(
                next(states["exp_avg"] for states in found.values() if is_main_replica(states["exp_avg"][0].replica_id))
            )
        return found

    DistributedOptimizer.sharded_param_state_fully_reshardable = rectangles  # type: ignore[method-assign]
    try:
        yield
    finally:
        DistributedOptimizer.sharded_param_state_fully_reshardable = ours  # type: ignore[method-assign]


def leave_out(parts: dict[int, Any]) -> None:
    del parts[0]


def double(parts: dict[int, Any]) -> None:
    parts[len(parts)] = replace(parts[0])


def shift(parts: dict[int, Any]) -> None:
    first, *others = parts[0].global_offset
    parts[0] = replace(parts[0], global_offset=(first + 1, *others))


def faults(root: Path) -> dict[str, str]:
    chain = CASES[0]
    model, at = root / chain.model, root / "faults"
    found = {}
    with fresh(chain, model) as engine:
        load_initial_weights(engine, InitSource("hf", model, model))
        engine.start_optimizer()
        on_rank0(at.mkdir)
        for change in (leave_out, double, shift):
            with tampered(change):
                found[change.__name__] = told(lambda name=change.__name__: plan_role(engine, at / name))
        save(engine, at / "whole")
        for name, spoil in {"a lost chunk": lose_chunk, "a lost tensor": lose_tensor}.items():
            on_rank0(lambda spoil=spoil: spoil(at / "whole" / ".metadata"))
            found[name] = told(lambda: load_role(engine, at / "whole", optimizer=True))
    return found


def lose_chunk(path: Path) -> None:
    metadata = pickle.loads(path.read_bytes())
    del metadata.state_dict_metadata["optimizer.state.exp_avg_sq.decoder.layers.mlp.linear_fc1.weight"].chunks[-1]
    path.write_bytes(pickle.dumps(metadata))


def lose_tensor(path: Path) -> None:
    metadata = pickle.loads(path.read_bytes())
    del metadata.state_dict_metadata["optimizer.state.exp_avg_sq.decoder.layers.mlp.linear_fc1.weight"]
    path.write_bytes(pickle.dumps(metadata))


# ---------------------------------------------------------------- memory


def above(work: Callable[[], Any]) -> int:
    """Bytes of the highest resident memory above what there was before."""
    gc.collect()
    give_back_freed()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak
    resident = re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    work()
    return round(peak_gib() * 2**30) - int(resident[1]) * 1024


def memory(root: Path) -> dict[str, int]:
    """What a save to host memory, a load, and Megatron's own save take of a role with 50 MiB of states a rank."""
    chain = Chain("qwen2", "actor", "bfloat16", True, (("",),))
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096}
    model = root / "large"
    save_reference(config_of(chain.family, **sizes), chain.role, model)
    with fresh(chain, model) as engine:
        engine.start_optimizer()
        save(engine, root / "first")  # what is made once, with the first save of a process
        saves: list[RoleSave] = []

        def snapshot() -> None:
            saves.append(plan_role(engine, root / "second"))
            saves[0].to_host()

        found = {"save": above(snapshot), "staged": saves[0].nbytes}
        saves[0].write(threading.Event())
        saves[0].finish()
        saves.clear()
        found["load"] = above(lambda: load_role(engine, root / "second", optimizer=True))
        found["own"] = sum(tensor.nbytes for tensor in engine.parts._optimizer_tensors())
        found["parameters"] = sum(p.numel() for part in engine.models for p in part.parameters())
        with megatrons_own():
            found["gathered"] = above(lambda: plan_role(engine, root / "gathered"))
    return found


def main() -> None:
    start(threads=1, timeout_s=60)
    root = Path(sys.argv[1])
    torch.manual_seed(0)
    gc.freeze()  # Megatron collects garbage whenever it saves or loads
    result = {"cases": [both_ways(root, chain) for chain in CASES], "faults": faults(root), "memory": memory(root)}
    (root / f"rank-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
