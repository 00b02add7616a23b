"""Two ranks: two replicas, then one tensor-parallel replica, sample what one replica samples."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from tempo_megatron.data.ragged import Ragged
from tempo_megatron.rollout.collect import rollout
from tempo_megatron.rollout.prompts import PromptDraw
from tests.launching import launch_ranks
from tests.rollout.tiny_models import MAX_MODEL_LEN, STOP_TOKEN_IDS, Engines, random_prompt, source

SIZES = {"samples_per_prompt": 3, "max_response_tokens": 12}
DRAWS = [
    {"record_id": f"r{i}", "prompt_token_ids": random_prompt(i, 4 + 9 * i), "labeled": i % 2 == 0, "seed": 50 * i}
    for i in range(5)
]


PLACES = {1: [[2, 0, True], [2, 1, True]], 2: [[1, 0, True], [1, 0, False]]}
#: Fewer than a replica's share, so that most prompts are drawn while others are sampled.
MAX_NUM_SEQS = 4
FORCED = [max(1, min(60, round(8 * random.Random(i).lognormvariate(0, 1)))) for i in range(14)]
LAYOUTS = [("qwen3", 1), ("qwen3", 2), ("qwen3_moe", 2), ("olmo3", 2)]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    settings = {
        "folders": {model: str(request.getfixturevalue(model).folder) for model, _ in LAYOUTS},
        "layouts": LAYOUTS,
        "config": {
            "dtype": "float32",
            "kv_cache_gib": 0.0625,
            "max_num_seqs": MAX_NUM_SEQS,
            "max_num_batched_tokens": 1024,
        },
        "max_model_len": MAX_MODEL_LEN,
        "stop_token_ids": STOP_TOKEN_IDS,
        "draws": DRAWS,
        "forced": FORCED,
        **SIZES,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    launch_ranks("tests.rollout.replicas_worker", folder / "settings.json", folder, nproc=2, timeout_s=250).check()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tensor_parallel_size"), LAYOUTS)
def test_every_layout_samples_what_one_replica_samples(
    results: Path, model: str, tensor_parallel_size: int, engines: Engines, request: pytest.FixtureRequest
) -> None:
    ranks = [json.loads((results / f"{model}-tp{tensor_parallel_size}-rank{r}.json").read_text()) for r in range(2)]
    assert [r["place"] for r in ranks] == PLACES[tensor_parallel_size]
    assert ranks[0]["batch"] == ranks[1]["batch"]
    assert [r["environment"] for r in ranks] == ["2", "2"]
    assert [r["failure"] for r in ranks] == [
        f"rollout: rank {2 - tensor_parallel_size} failed: ValueError: bad bytes"
    ] * 2

    engine = engines.of(model)
    engine.update_weights(source(request.getfixturevalue(model).first), 1)
    draws = [PromptDraw(**draw) for draw in DRAWS]
    alone = rollout(
        engine, draws, **SIZES, version=1, decode=lambda all_ids: [" ".join(map(str, ids)) for ids in all_ids]
    )
    batch = ranks[0]["batch"]
    replicas = set(batch.pop("source"))
    assert replicas <= ({0, 1} if tensor_parallel_size == 1 else {0})
    log_probs = torch.tensor([x for row in batch.pop("rollout_log_probs") for x in row])
    torch.testing.assert_close(log_probs, alone.rollout_log_probs.values, rtol=0, atol=1e-5)
    for name, value in batch.items():
        expected = getattr(alone, name)
        assert value == (expected.tolist() if isinstance(expected, torch.Tensor | Ragged) else expected), name


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("model", "tensor_parallel_size"), LAYOUTS)
def test_a_long_tail_is_the_same_whoever_drew_it(results: Path, model: str, tensor_parallel_size: int) -> None:
    ranks = [json.loads((results / f"{model}-tp{tensor_parallel_size}-rank{r}.json").read_text()) for r in range(2)]
    dealt, drawn = ([rank["forced"][name] for rank in ranks] for name in ("dealt", "drawn"))
    assert dealt[0]["all"] == drawn[0]["all"] == drawn[1]["all"]
    assert [[len(ids) for ids, _ in rows] for _, rows in drawn[0]["all"]] == [[n, n] for n in FORCED]
    prompts = list(range(len(FORCED)))
    if tensor_parallel_size == 1:
        assert sorted(drawn[0]["mine"] + drawn[1]["mine"]) == prompts
        assert [rank["texts"] for rank in drawn] == [2 * len(rank["mine"]) for rank in drawn]
    else:
        assert drawn[0]["mine"] == drawn[1]["mine"] == prompts
        assert drawn[0]["at"] == drawn[1]["at"]
        assert [rank["texts"] for rank in drawn] == [2 * len(FORCED), 0]  # the leader's
    for rank in drawn:
        assert max(rank["at"]) < MAX_NUM_SEQS
        # two prompts fit: one that is drawn into an empty replica is followed by another, whoever has drawn what
        assert all(then > 0 for now, then in itertools.pairwise(rank["at"]) if now == 0)
        assert sum(unfinished > 0 for unfinished in rank["at"]) >= len(rank["at"]) // 2, "a replica is kept filled"
    assert [rank["counters"] for rank in ranks] == [0, 0]
