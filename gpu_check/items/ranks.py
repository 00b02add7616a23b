"""Models on two ranks against transformers, by the worker of the parity table; what an all-reduce reaches."""

from __future__ import annotations

import json

import torch

from gpu_check.check import Check, SkippedError
from gpu_check.items.device import has_transformer_engine, why_no_transformer_engine
from gpu_check.items.models import tell
from tempo_megatron.errors import RunError
from tempo_megatron.parallel.device import use_cuda
from tests.launching import launch

#: Layout, family, role.
CASES = [
    ("distopt dim16", "llama", "critic"),
    ("tp2 sp dim16", "qwen3", "actor"),
    ("pp2 dim16", "llama-tied", "actor"),
    ("cp2 dim16", "olmo3", "critic"),
    ("ep2 dim16", "qwen3-moe", "actor"),
]
LIMIT_S = 200


def run(check: Check) -> None:
    if use_cuda() and torch.cuda.device_count() < 2:
        raise SkippedError("one GPU: two ranks need two")
    how = [{"dtype": "float32", "spec": "torch"}]
    if has_transformer_engine():
        how.append({"dtype": "bfloat16", "spec": "te"})
    else:
        check.note(why_no_transformer_engine())
    if not use_cuda():
        check.note("NCCL: two processes on the CPU, over gloo")
    cases = [
        {"ranks": 2, "layout": layout, "family": family, "role": role, **own}
        for layout, family, role in CASES
        for own in how
    ]
    listing = check.folder / "cases.json"
    listing.write_text(json.dumps(cases))
    done = launch(["-m", "tests.model.parity_worker", check.folder, listing], nproc=2, timeout_s=LIMIT_S).check()
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(results) != len(cases):
        raise RunError(f"{len(results)} of {len(cases)} cases were told")
    for found in results:
        layout = found["layout"].removesuffix(" dim16")
        tell(
            check,
            f"{layout}: {found['family']} {found['role']}, {found['spec']}",
            found,
            found["family"],
            found["dtype"],
        )
    print(done.stderr)
    if use_cuda():
        told = launch(["-m", "gpu_check.items.all_reduce"], nproc=2, timeout_s=60).check().stdout.splitlines()
        check.figure("an all-reduce of 1 GiB: bytes a second of the bus", float(told[-1]) * 1e-9, "GB/s")
