"""``tempo-megatron train --dry-run --nodes N --gpus-per-node G``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from tempo_megatron.checkpoint.hf_read import load_hf_config
from tempo_megatron.config.scaled import ScaledJob
from tempo_megatron.config.schema import Config
from tempo_megatron.errors import TempoError
from tempo_megatron.imports import uncollected
from tempo_megatron.loop.runtime import roles_of
from tempo_megatron.loop.scale.messages import check_pairs
from tempo_megatron.loop.scale.report import Found, record, show
from tempo_megatron.loop.scale.rollout import foresee_replicas
from tempo_megatron.loop.scale.rows import DRAWS, draw_rows, queue_shares
from tempo_megatron.loop.scale.setting import find_setting, telling_ranks
from tempo_megatron.loop.scale.walk import Job, play
from tempo_megatron.model.held import megatron_holdings
from tempo_megatron.planner.hardware import CARDS, Cluster
from tempo_megatron.planner.ledger import with_kv_cache

T = TypeVar("T")


def dry_run_at_scale(config: Config, job: ScaledJob) -> None:
    """Walk through one step of the job; what was found goes to stdout, and to ``job.json``.

    Raises:
        TempoError: what the job would be refused for or would end with, with the rank and the phase.
    """
    began = time.perf_counter()
    setting = find_setting(config, job)
    given, config, world = config, setting.config, job.world_size
    for note in setting.notes:
        _say(note)
    hf_configs = {role: load_hf_config(folder) for role, folder in setting.hf_dirs.items()}
    with uncollected():  # millions of small objects that stay
        holdings = {
            role: _in_phase("weight_map", partial(megatron_holdings, hf_configs[role], role, settings.parallel, world))
            for role, settings in roles_of(config).items()
        }
        replicas = None
        if config.stage != "sft":
            cluster = Cluster(job.nodes, job.gpus_per_node, CARDS[config.slurm.gpu or "h100-80gb"])
            config = config.model_copy(
                update={
                    "rollout": with_kv_cache(given, {str(role): c for role, c in hf_configs.items()}, cluster).rollout
                }
            )
            arguments = config, setting.hf_dirs["actor"], holdings["actor"], job.gpus_per_node
            replicas = _in_phase("rollout", partial(foresee_replicas, *arguments))
            took = time.perf_counter() - began
            told = f"{world // replicas.size} replicas of {replicas.size} ranks"
            _say(f"vLLM: {told}, and the plan of their weights, in {took:.0f} s")
    rows = {draw: draw_rows(config, draw, setting.prompts) for draw in DRAWS}
    number = world // config.rollout.tensor_parallel_size
    shares = {draw: queue_shares(some, number, config.rollout.max_num_seqs) for draw, some in rows.items()}
    walked = Job(config, world, setting.hf_dirs, holdings, rows, shares, job.micro_batches)
    played = {}
    for rank in job.ranks or telling_ranks(config, world):
        start = time.perf_counter()
        played[rank] = play(walked, rank)
        _say(f"rank {rank}: walked through in {time.perf_counter() - start:.0f} s")
    pairs = check_pairs(played)
    found = Found(config, job, setting.notes, walked, played, pairs, replicas, time.perf_counter() - began)
    show(found)
    if job.json is not None:
        job.json.write_text(json.dumps(record(found), indent=1) + "\n")


def _in_phase(phase: str, do: Callable[[], T]) -> T:
    """What all ranks have in common: the first of them would tell of it."""
    try:
        return do()
    except TempoError as error:
        raise TempoError(f"rank 0, {phase}: {error}") from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
