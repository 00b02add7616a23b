"""Started by ``test_fp8``: trainers in several layouts to replicas in FP8. Rank 0 prints a JSON line per case."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.model.held import megatron_holdings
from tempo_megatron.reshard.fp8 import Blocks, Quantiser, quantised_tensors
from tempo_megatron.reshard.holdings import WeightSource
from tempo_megatron.reshard.plan import Plan
from tempo_megatron.reshard.proof import Proof
from tempo_megatron.reshard.regions import matrix_shape
from tempo_megatron.reshard.transfer import Transfer
from tests.reshard.worlds import destinations, held_by, in_fp8, model, quantised_model, taken_by, whole_model

CPU = torch.device("cpu")
#: (tensor parallel, pipeline parallel, ranks of a replica, block)
CASES = [(4, 1, 1, 5), (4, 1, 4, 12), (2, 2, 2, 6), (1, 2, 4, 4), (2, 1, 4, 7)]


class Targets:
    """Matrices of what a rank takes (``reshard.transfer.Receiver``)."""

    def __init__(self, plan: Plan, rank: int) -> None:
        destination = plan.destination_of(rank)
        self.matrices = [torch.zeros(matrix_shape(t.shape), dtype=getattr(torch, t.dtype)) for t in destination.targets]

    def borrows(self, target: int) -> bool:
        return True

    def open(self, bucket: int, lent: Mapping[int, Tensor]) -> None:
        for target, matrix in lent.items():
            self.matrices[target] = matrix.clone()  # the trainer's own is not altered

    def matrix(self, target: int) -> Tensor:
        return self.matrices[target]

    def finish(self, bucket: int) -> None:
        pass

    def buffer_bytes(self) -> int:
        return 0


def _differing(plan: Plan, rank: int, source: WeightSource, targets: Targets) -> list[str]:
    proof = Proof(plan, rank, CPU)
    for number, matrix in enumerate(targets.matrices):
        proof.see(number, matrix, is_lent=False)
    return proof.differing(source, dist.group.WORLD)


def _gathered(value: object) -> list[object]:
    found: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def check(tensor: int, stages: int, size: int, block: int) -> dict[str, object]:
    rank, world = dist.get_rank(), dist.get_world_size()
    config = model(experts=False, tied=False, layers=2, heads=8, kv=2, vocab=37)
    layout = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=stages)
    trainer = megatron_holdings(config, "actor", layout, world)
    into = [in_fp8(destination, block) for destination in destinations(config, size)]
    tensors = whole_model(config, 0)
    blocks = Blocks(trainer, quantised_tensors(into), block)
    plan = Plan(blocks.holdings, into, 1024, world)
    weights = WeightSource(trainer, held_by(trainer, rank, tensors), lambda: None)
    source = Quantiser(blocks, rank, dist.group.WORLD, CPU).run(weights)
    targets = Targets(plan, rank)
    moved = Transfer(plan, rank, dist.group.WORLD, CPU).run(source, targets)
    for target, region in plan.destination_of(rank).fills:
        region.of(targets.matrices[target]).zero_()
    wanted = taken_by(plan.destination_of(rank), quantised_model(tensors, block))
    equal = all(
        torch.equal(got.view(torch.uint8), want.view(torch.uint8))
        for got, want in zip(targets.matrices, wanted, strict=True)
    )
    differing = _differing(plan, rank, source, targets)
    altered = next(n for n, t in enumerate(plan.destination_of(rank).targets) if t.name.endswith("down_proj.weight"))
    targets.matrices[altered].view(torch.uint8)[0, 0] ^= 1
    return {
        "told": blocks.told,
        "received": _gathered(moved.received),
        "equal": _gathered(equal),
        "differing": _gathered(differing),
        "altered": _gathered(_differing(plan, rank, source, targets)),
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in CASES:
        found = check(*case)
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
