"""Updates of a replica's weights: the plan, made once and agreed, carried out and proved each time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from tempo_megatron.cluster.pulse import ping
from tempo_megatron.config.rollout import RolloutConfig
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.parallel.device import device
from tempo_megatron.parallel.distributed import gather_objects
from tempo_megatron.reshard.fp8 import Blocks, Quantiser, RoundedSource, quantised_tensors
from tempo_megatron.reshard.holdings import Holdings, WeightSource
from tempo_megatron.reshard.plan import Destination, Plan
from tempo_megatron.reshard.proof import Proof
from tempo_megatron.reshard.transfer import Moved, Transfer
from tempo_megatron.rollout.weights import RolloutReceiver, RolloutWeights

if TYPE_CHECKING:
    from vllm import LLMEngine

#: An update that is not proved completely is proved in one tensor of so many, others each time.
PROVED_IN_TURN = 16


@dataclass(frozen=True)
class Update:
    """What one update did on this rank.

    Attributes:
        version: of the weights.
        moved: bytes; as many as planned.
        proved: tensors whose digests were compared, of ``tensors``.
        whole_bytes: of tensors that could not be taken in parts (``Destination.whole`` names their modules).
        seconds: of all; ``proof_s`` of them for the proof.
    """

    version: int
    moved: Moved
    proved: int
    tensors: int
    whole_bytes: int
    seconds: float
    proof_s: float


class WeightUpdater:
    """This rank's side of the updates of one engine.

    Args:
        expected: names and shapes of the HF tensors that make the model.
        config: the ``rollout`` section.
    """

    def __init__(self, llm: LLMEngine, expected: Mapping[str, tuple[int, ...]], config: RolloutConfig) -> None:
        ((model, vllm_config),) = llm.collective_rpc(lambda worker: (worker.get_model(), worker.vllm_config))
        self._weights = RolloutWeights(model, vllm_config, expected)
        self._expected, self._config = expected, config
        self._planned_for: Holdings | None = None
        self._transfer: Transfer | None = None
        self._receiver: RolloutReceiver | None = None
        self._quantiser: Quantiser | None = None

    @property
    def plan(self) -> Plan:
        """The current one."""
        assert self._transfer is not None
        return self._transfer.plan

    def update(self, source: WeightSource, version: int, *, complete: bool) -> Update:
        """Collective over the world.

        Args:
            complete: prove all tensors; else some, in turn.

        Raises:
            RunError: ranks have different plans, or what has landed is not what the trainer holds.
            TempoError: the source does not hold the model's tensors.
        """
        began = time.perf_counter()
        transfer, receiver = self._prepared(source.holdings)
        if self._quantiser is not None:
            quantised = self._quantiser.run(source)
            source = RoundedSource.of(source, quantised) if self._config.weights == "fp8-emulated" else quantised
        rank, world = dist.get_rank(), dist.get_world_size()
        proof = Proof(transfer.plan, rank, device(), None if complete else _in_turn(transfer.plan, version))
        proof_s = 0.0

        def see(target: int, matrix: torch.Tensor, is_lent: bool) -> None:
            nonlocal proof_s
            start = time.perf_counter()
            proof.see(target, matrix, is_lent)
            ping()
            proof_s += time.perf_counter() - start

        receiver.on_arrived = see
        with torch.no_grad():
            receiver.begin()
            moved = transfer.run(source, receiver)
            receiver.end()
            start = time.perf_counter()
            differing = proof.differing(source, dist.group.WORLD if world > 1 else None)
            self._require_landed(differing, len(proof.index), version)
        now = time.perf_counter()
        proof_s += now - start
        return Update(
            version=version,
            moved=moved,
            proved=len(proof.index),
            tensors=len(transfer.plan.holdings.shapes),
            whole_bytes=self._weights.destination.whole_bytes,
            seconds=now - began,
            proof_s=proof_s,
        )

    def _prepared(self, holdings: Holdings) -> tuple[Transfer, RolloutReceiver]:
        if holdings is not self._planned_for or self._transfer is None or self._receiver is None:
            require_expected(holdings, self._expected)
            rank = dist.get_rank()
            destinations = self._destinations()
            blocks = self._blocks(holdings, destinations)
            held = blocks.holdings if self._config.weights == "fp8" and blocks is not None else holdings
            plan = self._agreed_plan(held, destinations)
            group = dist.group.WORLD if dist.get_world_size() > 1 else None
            self._transfer = Transfer(plan, rank, group, device())
            self._receiver = self._weights.receiver(plan, rank)
            self._quantiser = None if blocks is None else Quantiser(blocks, rank, group, device())
            self._planned_for = holdings
        return self._transfer, self._receiver

    def _destinations(self) -> list[Destination]:
        """Those of the first replica are everybody's: that others load alike is part of what is agreed."""
        is_first = dist.get_rank() < self._config.tensor_parallel_size
        sent = gather_objects(self._weights.destination if is_first else None)
        return [destination for destination in sent if destination is not None]

    def _blocks(self, holdings: Holdings, destinations: list[Destination]) -> Blocks | None:
        """Of the tensors that the trainer's ranks quantise; TempoError where vLLM has no layer in FP8 and should."""
        if self._config.weights == "fp8-emulated":
            return Blocks(holdings, in_fp8(holdings.shapes))
        names = quantised_tensors(destinations)
        if bool(names) != (self._config.weights == "fp8"):
            told = "holds no layer in FP8" if not names else f"holds layers in FP8, such as {min(names)}"
            raise TempoError(f"rollout.weights: {self._config.weights}: vLLM {told}")
        return Blocks(holdings, names) if names else None

    def _agreed_plan(self, holdings: Holdings, destinations: list[Destination]) -> Plan:
        size, rank = self._config.tensor_parallel_size, dist.get_rank()
        near = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        plan = Plan(holdings, destinations, self._config.bucket_mib << 20, near)
        alike = destinations[rank % size] == self._weights.destination
        found = gather_objects((plan.digest(), alike))
        odd = [r for r, (digest, same) in enumerate(found) if digest != found[0][0] or not same]
        if odd:
            raise RunError(f"rollout: rank {odd[0]} has another plan for the rollout's weights than rank 0")
        return plan

    def _require_landed(self, differing: list[str], checked: int, version: int) -> None:
        for rank, names in enumerate(gather_objects(differing)):
            if names:
                raise RunError(
                    f"rollout: the weights of version {version} did not land: on rank {rank} {len(names)} of {checked} "
                    f"tensors differ from the trainer's, such as {names[0]}"
                )


def _in_turn(plan: Plan, version: int) -> set[str]:
    """Of a plan's tensors, scales among them."""
    return {name for n, name in enumerate(plan.holdings.shapes) if n % PROVED_IN_TURN == version % PROVED_IN_TURN}


def in_fp8(names: Iterable[str]) -> list[str]:
    """HF tensors that published FP8 checkpoints quantise: all linear layers but routers and the output layer."""
    return [name for name in names if name.endswith("_proj.weight")]


def require_expected(holdings: Holdings, expected: Mapping[str, tuple[int, ...]]) -> None:
    """TempoError unless a trainer has just the tensors that make the model."""
    missing = [name for name in expected if name not in holdings.shapes]
    if missing:
        raise TempoError(
            f"rollout: the trainer lacks {len(missing)} of {len(expected)} tensors of the model, such as {missing[0]}"
        )
    for name, shape in holdings.shapes.items():
        if name not in expected:
            raise TempoError(f"rollout: the trainer brings {name}, which the model does not have")
        if expected[name] != shape:
            raise TempoError(f"rollout: the trainer has {name} as {list(shape)}, the model as {list(expected[name])}")
