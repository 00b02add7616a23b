"""vLLM's side of the job: its replicas, what they hold, and what an update of their weights moves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tempo_megatron.checkpoint.hf_read import load_hf_config
from tempo_megatron.config.schema import Config
from tempo_megatron.model.hf_tensors import expected_tensors
from tempo_megatron.reshard.fp8 import Blocks, quantised_tensors
from tempo_megatron.reshard.holdings import Holdings
from tempo_megatron.reshard.plan import Plan
from tempo_megatron.rollout.engine import load_vllm
from tempo_megatron.rollout.landings import foreseen_ranks


@dataclass(frozen=True)
class Replicas:
    """All replicas; they are alike.

    Attributes:
        size: ranks of one.
        weights: bytes of each of its ranks.
        kv_tokens: what the KV cache of each of its ranks has room for.
        received, sent, local: bytes of one update, by rank of the job.
        between_nodes: bytes of one update that leave a node.
        buckets, buffer_bytes: of an update; buffers of the bucket with the largest.
        digest: of the plan.
    """

    size: int
    weights: list[int]
    kv_tokens: list[int]
    received: np.ndarray
    sent: np.ndarray
    local: np.ndarray
    between_nodes: int
    buckets: int
    buffer_bytes: int
    digest: str


def foresee_replicas(config: Config, hf_dir: Path, holdings: Holdings, ranks_per_node: int) -> Replicas:
    """Build every rank of a replica without numbers, and make the plan that all ranks would agree on.

    Raises:
        TempoError: vLLM cannot run the model so, or takes what no rank has.
    """
    load_vllm()
    data = config.data
    longest = data.max_prompt_tokens + data.max_response_tokens
    tensors = expected_tensors(load_hf_config(hf_dir), "actor")
    ranks = list(foreseen_ranks(hf_dir, tensors, config.rollout, longest))
    destinations = [rank.destination for rank in ranks]
    if names := quantised_tensors(destinations):
        holdings = Blocks(holdings, names).holdings
    plan = Plan(holdings, destinations, config.rollout.bucket_mib << 20, ranks_per_node)
    traffic = plan.traffic()
    return Replicas(
        size=len(ranks),
        weights=[rank.weights for rank in ranks],
        kv_tokens=[rank.kv_tokens or 0 for rank in ranks],
        received=traffic.received,
        sent=traffic.sent,
        local=traffic.local,
        between_nodes=traffic.between_nodes(ranks_per_node),
        buckets=plan.num_buckets,
        buffer_bytes=max(plan.buffer_bytes),
        digest=plan.digest(),
    )
