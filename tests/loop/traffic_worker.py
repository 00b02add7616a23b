"""One EM step for each of some settings, with every collective of it noted; started by ``test_placement``.

``traffic_worker RUNS.json FOLDER``: name -> overrides; every rank writes ``FOLDER/NAME-RANK.json``.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.launching import ROOT
from tests.loop import em_runs

TENSOR_COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")

collectives: list[list[Any]] = []
objects: list[int] = []  # bytes
moved: list[int] = []


def noted(name: str) -> Callable[..., Any]:
    """The collective, with its name and the bytes of its tensors put down first."""
    original = getattr(dist, name)

    @wraps(original)
    def note(*args: Any, **kwargs: Any) -> Any:
        values = [x for arg in (*args, *kwargs.values()) for x in (arg if isinstance(arg, list) else [arg])]
        size = sum(x.nbytes for x in values if isinstance(x, torch.Tensor))
        collectives.append([name, sys._getframe(1).f_globals["__name__"], size])
        return original(*args, **kwargs)

    return note


def pickling(original: Callable[..., Any], which: int) -> Callable[..., Any]:
    def note(*args: Any, **kwargs: Any) -> Any:
        objects.append(len(pickle.dumps(args[which])))
        return original(*args, **kwargs)

    return note


def moving(original: Callable[..., Any]) -> Callable[..., Any]:
    def note(output: torch.Tensor, given: torch.Tensor, received: list[int], sent: list[int], **kwargs: Any) -> Any:
        moved.append(output.element_size() * (sum(received) - received[dist.get_rank()]))
        return original(output, given, received, sent, **kwargs)

    return note


def run(overrides: list[str]) -> dict[str, Any]:
    from tempo_megatron.loop import em

    found: dict[str, Any] = {}
    place = em.place

    def watched_place(session: Any, batch: Any, *args: Any) -> Any:
        before = len(moved)
        placed = place(session, batch, *args)
        rank, lengths = dist.get_rank(), batch.response_lengths
        mine = placed.actor_home == session.engines["actor"].groups.dp_rank
        found.update(
            rows=len(batch),
            tokens=int(lengths.sum()),
            shard_tokens=int(lengths[mine].sum()),
            foreign_tokens=int(lengths[mine & (batch.source != rank)].sum()),
            held=placed.response_token_ids.nbytes + placed.rollout_log_probs.nbytes,
            received=sum(moved[before:]),
        )
        return placed

    step = em.EMLoop._em_step

    def watched_step(loop: em.EMLoop, begun: Any) -> Any:
        for noted_ones in (collectives, objects, moved):
            noted_ones.clear()
        result = step(loop, begun)
        found.update(collectives=list(collectives), largest_object=max(objects), moved=list(moved))
        return result

    em.place, em.EMLoop._em_step = watched_place, watched_step  # type: ignore[method-assign]
    try:
        with em_runs.Session(em_runs.load_config(str(ROOT / "configs/demo/tempo.yaml"), overrides)) as session:
            em.EMLoop(session).run()
    finally:
        em.place, em.EMLoop._em_step = place, step  # type: ignore[method-assign]
    em_runs.close_groups()
    return found


def main() -> None:
    for name in TENSOR_COLLECTIVES:
        setattr(dist, name, noted(name))
    dist.all_to_all_single = moving(dist.all_to_all_single)
    dist.all_gather_object = pickling(dist.all_gather_object, 1)
    dist.broadcast_object_list = pickling(dist.broadcast_object_list, 0)
    runs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, overrides in runs.items():
        found = run(overrides)
        (folder / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
