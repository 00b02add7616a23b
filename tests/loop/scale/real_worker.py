"""One step of small jobs by real ranks, with all that they send noted; ``real_worker FOLDER``, a JSON line per case.

Cases run in one set of ranks, one after the other.
"""

from __future__ import annotations

import json
import sys
import threading
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator  # noqa: E402

from tempo_megatron.checkpoint.megatron_state import plan_role  # noqa: E402
from tempo_megatron.checkpoint.planned import planned_shards  # noqa: E402
from tempo_megatron.config.schema import ResidencyConfig  # noqa: E402
from tempo_megatron.locate import InitSource  # noqa: E402
from tempo_megatron.loop.residency import Residency  # noqa: E402
from tempo_megatron.loop.runtime import Trainers  # noqa: E402
from tempo_megatron.loop.scale.walk import WALKED, Job, train_step  # noqa: E402
from tempo_megatron.parallel.distributed import rank, start, world_size  # noqa: E402
from tempo_megatron.telemetry.phases import PhaseLedger  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine  # noqa: E402
from tests.loop.scale.jobs import Case, job_for  # noqa: E402

CASES = (
    Case(4, "qwen3-moe", "tp2 pp2 sp ep2 distopt"),
    Case(4, "qwen3", "pp2 vpp2 cp2 distopt", critic="tp2 sp", dtype="float32"),
)


class RealTrainers(Trainers):
    """With random weights."""

    def __init__(self, job: Job) -> None:
        self.config, self.hf_config = job.config, None  # type: ignore[assignment]
        self.phase = ""
        self.ledger = PhaseLedger(on_phase=lambda name: setattr(self, "phase", name))
        self.residency = Residency(ResidencyConfig(), Path(), phase=lambda: self.phase)
        self.sources = {role: InitSource("hf", folder, folder) for role, folder in job.hf_dirs.items()}
        self.engines, self.hf_dirs = {}, {}
        self.build_engines(trainable=True)
        self.hf_config = self.engines["actor"].hf_config
        for engine in self.engines.values():
            for model in engine.models:
                for parameter in model.parameters():
                    parameter.data.normal_(std=0.02)
            engine.start_optimizer()


def watch(trainers: RealTrainers, passes: list[dict[str, Any]]) -> None:
    """Note each pass over micro-batches, and the messages between stages in it."""
    run = MegatronEngine._run

    @wraps(run)
    def noted_run(engine: MegatronEngine, microbatches: Any, loss: Any) -> Any:
        kind = "forward" if loss is None else "step"
        rows = sum(map(len, microbatches.plan))
        found = {"phase": trainers.phase, "role": engine.role, "kind": kind, "rows": rows, "sizes": microbatches.sizes}
        passes.append({**found, "sent": [], "received": []})
        return run(engine, microbatches, loss)

    communicate = P2PCommunicator._communicate

    @wraps(communicate)
    def noted(communicator: Any, **what: Any) -> Any:
        got = communicate(communicator, **what)
        for list_of, tensors in (
            ("sent", {"previous": what["tensor_send_prev"], "next": what["tensor_send_next"]}),
            ("received", {"previous": got[0], "next": got[1]}),
        ):
            told = [[n, list(x.shape), str(x.dtype)] for n, x in tensors.items() if x is not None]
            passes[-1][list_of] += told
        return got

    MegatronEngine._run, P2PCommunicator._communicate = noted_run, noted  # type: ignore[method-assign]


def trained(case: Case, folder: Path) -> dict[str, Any]:
    job = job_for(case, folder / f"model-{rank()}")
    trainers = RealTrainers(job)
    passes: list[dict[str, Any]] = []
    originals = MegatronEngine._run, P2PCommunicator._communicate
    watch(trainers, passes)
    try:
        train_step(trainers, job.rows[WALKED], job.shares[WALKED], rank())
    finally:
        MegatronEngine._run, P2PCommunicator._communicate = originals  # type: ignore[method-assign]
    roles = {}
    for role, engine in trainers.engines.items():
        shards = [[s.key, list(s.offset), s.nbytes, s.copies] for s in planned_shards(engine)]
        save = plan_role(engine, folder / f"{case.family}-{role}")
        save.write(threading.Event())
        written = sum(shard.digest.size for shard in save.shards)
        parts = {name: getattr(engine.parts, name).nbytes() for name in ("weights", "gradients", "optimizer")}
        roles[role] = {**parts, "shards": shards, "written": written}
    return {"case": case.name, "rank": rank(), "passes": passes, "roles": roles}


def main() -> None:
    start(threads=1, timeout_s=60)
    torch.manual_seed(rank())
    folder = Path(sys.argv[1])
    for case in CASES:
        assert case.ranks == world_size()
        (folder / f"{case.family}-{rank()}.json").write_text(json.dumps(trained(case, folder)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
