"""``tempo-megatron plan``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = """What a job takes on a cluster that need not be here: memory by phase, operations and seconds of a step.

Nothing is started and no weights are read, only the models' config.json. Ranges: what is there for certain, from half
full micro-batches to full ones, and what is assumed of libraries. Exit code 0: it fits, or may not; 3: it does not.

  tempo-megatron plan --config configs/qwen3-8b/tempo.yaml --nodes 1 --gpus-per-node 8 --gpu h100-80gb
  tempo-megatron plan --config X.yaml --nodes 4 --model models/Qwen3-14B residency.sleep=true --picture plan.png
  tempo-megatron plan --config X.yaml --nodes 4 --search
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, as of train")
    parser.add_argument("--nodes", type=int, metavar="N", help="default: slurm.nodes")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="ranks; default: slurm.gpus_per_node")
    parser.add_argument(
        "--gpu", metavar="NAME", help="a100-80gb, h100-80gb, h200, b200 or cpu; default: slurm.gpu, or h100-80gb"
    )
    parser.add_argument("--device-memory-gib", type=float, metavar="X", help="of one card; default: NAME's")
    parser.add_argument(
        "--host-memory-gib", type=float, metavar="X", help="of one node; default: slurm.host_memory_gib"
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="folder with config.json, where actor.init or critic.init is not there",
    )
    parser.add_argument(
        "--rate", action="append", default=[], metavar="NAME=X", help="a rate of the card instead, such as bf16=8e14"
    )
    parser.add_argument("--prompt-tokens", type=float, metavar="X", help="mean; default: a quarter of the longest")
    parser.add_argument("--response-tokens", type=float, metavar="X", help="mean; default: half of the longest")
    parser.add_argument("--search", action="store_true", help="layouts that fit, the fastest first, as YAML to paste")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="PNG: a bar for each phase against the card")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, in bytes, operations and seconds")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings that win over the file")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from tempo_megatron.planner.advice import suggestions
    from tempo_megatron.planner.ledger import plan_ledger
    from tempo_megatron.planner.request import read_request
    from tempo_megatron.planner.show import record, show_ledger, show_proposals, show_suggestions, show_work
    from tempo_megatron.planner.work import Lengths, step_work

    request = read_request(
        arguments.config,
        arguments.overrides,
        nodes=arguments.nodes,
        ranks_per_node=arguments.gpus_per_node,
        card=arguments.gpu,
        device_memory_gib=arguments.device_memory_gib,
        host_memory_gib=arguments.host_memory_gib,
        model=arguments.model,
        rates=arguments.rate,
    )
    console = Console()
    ledger = plan_ledger(request.config, request.sizes, request.cluster)
    lengths = Lengths.of(request.config, arguments.prompt_tokens, arguments.response_tokens)
    cache = 0 if ledger.kv is None else ledger.kv.bytes
    work = step_work(request.config, request.sizes, request.cluster, ledger.states, lengths, cache)
    show_ledger(request, ledger, console)
    show_work(work, lengths, request.cluster, console)
    advised = suggestions(request, ledger) if ledger.verdict != "fits" else []
    show_suggestions(advised, console)
    proposals = None
    if arguments.search:
        from tempo_megatron.planner.search import search

        proposals = search(request, lengths)
        show_proposals(proposals, work, console)
    if arguments.picture is not None:
        from tempo_megatron.planner.picture import draw_ledger

        cluster = request.cluster
        title = f"{arguments.config} on {cluster.nodes} x {cluster.ranks_per_node} {cluster.card.name}"
        draw_ledger(ledger, title, arguments.picture)
    if arguments.json is not None:
        told = record(request, ledger, work, advised, proposals)
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")
    return 3 if ledger.verdict == "does not fit" else 0
