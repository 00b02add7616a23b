"""Played ranks against arithmetic, against each other, and against real ranks."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.checkpoint.rectangles import Cover, Rectangle  # noqa: E402
from tempo_megatron.errors import TempoError  # noqa: E402
from tempo_megatron.loop import mstep  # noqa: E402
from tempo_megatron.loop.scale.messages import check_pairs  # noqa: E402
from tempo_megatron.loop.scale.setting import telling_ranks  # noqa: E402
from tempo_megatron.loop.scale.walk import WALKED, PlayedRank, play  # noqa: E402
from tempo_megatron.model.hf_tensors import expected_tensors  # noqa: E402
from tests.launching import launch_ranks  # noqa: E402
from tests.loop.scale.jobs import Case, job_for  # noqa: E402
from tests.loop.scale.real_worker import CASES  # noqa: E402
from tests.model.parity_cases import config_of  # noqa: E402

WALKS = (
    Case(8, "llama-tied", "pp2 cp2 distopt"),
    Case(16, "olmo3", "tp2 pp2 vpp2 sp distopt", critic="tp2"),
    Case(64, "qwen3-moe", "tp2 pp4 sp ep4 distopt"),
    Case(32, "qwen3-moe", "tp2 cp2 sp ep2 etp2", critic="pp4"),
)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """Megatron collects garbage with each optimizer's state: not in all that a test session has imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("case", WALKS, ids=lambda case: case.name)
def test_a_step_is_walked_through_in_any_layout(case: Case, tmp_path: Path) -> None:
    job = job_for(case, tmp_path)
    ranks = telling_ranks(job.config, case.ranks)
    assert ranks[0] == 0 and ranks[-1] == case.ranks - 1
    played = {rank: play(job, rank) for rank in ranks}
    pipelines = {role for role in job.holdings if getattr(job.config, role).parallel.pipeline_model_parallel_size > 1}
    assert {pair.role for pair in check_pairs(played)} == pipelines
    for rank, one in played.items():
        kinds = {(p.role, p.kind) for p in one.passes[WALKED] if p.walked}
        assert kinds == {("critic", "forward"), ("critic", "step"), ("actor", "forward"), ("actor", "step")}
        for role, of_role in one.roles.items():
            mine = job.holdings[role].groups_of_rank[rank]
            parts = [part for part in job.holdings[role].parts if part.group in mine]
            elements = sum(mapped.region.numel for part in parts for _, mapped in part.held)
            assert elements <= of_role.parameters <= elements + 64 * 48, "a padded vocabulary at most"
            assert of_role.weights >= of_role.parameters * 2
            assert of_role.gradients >= of_role.parameters * 4


def test_the_rows_and_shards_of_all_ranks_are_the_whole(tmp_path: Path) -> None:
    """As every rank of a job: each row is trained once a pass, and each element of a checkpoint is saved once."""
    case = Case(8, "qwen3-moe", "tp2 pp2 sp ep2 distopt")
    job = job_for(case, tmp_path, micro_batches=0)  # models, rows and plans only
    played = [play(job, rank) for rank in range(case.ranks)]
    for draw, rows in job.rows.items():
        for number, one in enumerate(played[0].passes[draw]):
            shards = {p.roles[one.role].place["DP"]: p.passes[draw][number] for p in played}
            assert len({len(p.sizes) for p in shards.values()}) == 1
            if one.phase == "log_probs":
                assert sum(p.rows for p in shards.values()) == len(rows)
    for role in job.holdings:
        found: dict[str, dict[tuple[int, ...], Any]] = {}
        rectangles: dict[str, list[Rectangle]] = {}
        written = 0.0
        for one in played:
            for shard in one.roles[role].shards:
                found.setdefault(shard.key, {})[shard.offset] = shard
                written += shard.nbytes / shard.copies
                if shard.key.startswith("optimizer."):
                    assert shard.copies == 1
                    rectangles.setdefault(shard.key, []).append(Rectangle(shard.offset, shard.shape))
        for key, parts in rectangles.items():
            assert Cover.of(next(iter(found[key].values())).global_shape, parts).fault is None, key
        for key, shards in found.items():
            whole = math.prod(next(iter(shards.values())).global_shape)
            assert sum(math.prod(shard.shape) for shard in shards.values()) == whole, key
        distinct = sum(shard.nbytes for shards in found.values() for shard in shards.values())
        assert written == pytest.approx(distinct)
        states = [k for k in found if k.startswith("optimizer.state.exp_avg.")]
        expected = expected_tensors(config_of(case.family), role)
        elements = sum(math.prod(next(iter(found[k].values())).global_shape) for k in states)
        assert elements == pytest.approx(sum(map(math.prod, expected.values())), rel=0.05), "a padded vocabulary"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    launch_ranks("tests.loop.scale.real_worker", folder, nproc=4, timeout_s=120).check()
    return folder


@pytest.mark.slow(30)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_played_rank_does_what_a_real_one_does(case: Case, real: Path, tmp_path: Path) -> None:
    """Micro-batches, messages, bytes on the device and shards of the checkpoint are those of 4 real ranks."""
    job = job_for(case, tmp_path, micro_batches=100)
    found = {rank: json.loads((real / f"{case.family}-{rank}.json").read_text()) for rank in range(case.ranks)}
    for rank in (0, case.ranks - 1):
        one = play(job, rank)
        assert [_as_noted(p) for p in one.passes[WALKED]] == [_told(p) for p in found[rank]["passes"]]
        walked = [(p, q) for p, q in zip(one.passes[WALKED], found[rank]["passes"], strict=True) if p.walked]
        assert len(walked) == 4
        for played, noted in walked:
            assert played.walked == len(noted["sizes"])
            for way in ("sent", "received"):
                messages = [[m.neighbour, list(m.shape), str(m.dtype)] for m in getattr(played.traffic, way)]
                assert messages == noted[way], (rank, played.phase, way)
        for role, of_role in one.roles.items():
            noted = found[rank]["roles"][role]
            assert [of_role.weights, of_role.gradients, of_role.optimizer] == [
                noted[name] for name in ("weights", "gradients", "optimizer")
            ]
            assert [[s.key, list(s.offset), s.nbytes, s.copies] for s in of_role.shards] == noted["shards"]
    for role in job.holdings:
        planned = sum(nbytes / copies for one in found.values() for *_, nbytes, copies in one["roles"][role]["shards"])
        written = sum(one["roles"][role]["written"] for one in found.values())
        assert planned < written < planned + 2000 * sum(len(one["roles"][role]["shards"]) for one in found.values())


def _as_noted(one: Any) -> list[Any]:
    return [one.phase, one.role, one.kind, one.rows, one.sizes]


def _told(noted: dict[str, Any]) -> list[Any]:
    return [noted[name] for name in ("phase", "role", "kind", "rows", "sizes")]


def test_shards_without_a_row_are_told(tmp_path: Path) -> None:
    """More data-parallel ranks than rows is no fault: the others compute fillers."""
    case = Case(16, "llama-tied", "")
    data = {"labeled_prompts_per_step": 1, "unlabeled_prompts_per_step": 1, "max_prompt_tokens": 6}
    gate = {"gate": {"enabled": False}}
    one = play(job_for(case, tmp_path, data={**data, "max_response_tokens": 10}, algorithm=gate), 15)
    assert all(p.fillers == 1 and p.sizes == [1] for p in one.passes[WALKED] if p.phase == "e_step")


def test_a_crash_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("the kernel has no room\nfor 3 heads")

    monkeypatch.setattr(mstep, "policy_loss", broken)
    job = job_for(Case(8, "llama-tied", "pp2"), tmp_path)
    play(job, 0)  # of a stage that computes no loss
    with pytest.raises(TempoError, match=r"^rank 7, m_step: RuntimeError: the kernel has no room$"):
        play(job, 7)


def test_neighbours_that_disagree_are_told(tmp_path: Path) -> None:
    job = job_for(Case(4, "llama-tied", "pp2"), tmp_path)
    played: dict[int, PlayedRank] = {rank: play(job, rank) for rank in (0, 2)}
    first = next(p for p in played[0].passes[WALKED] if p.walked)
    first.traffic.sent[0] = first.traffic.sent[0]._replace(shape=(1, 1, 48))
    with pytest.raises(TempoError, match=r"^rank 0, values: sends \d messages to rank 2, which expects \d; the first"):
        check_pairs(played)
