"""Two ranks: two replicas, then one tensor-parallel replica, sample what one replica samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tempo_megatron.rollout.collect import PromptDraw, rollout
from tempo_megatron.rollout.engine import RolloutEngine
from tests.launching import launch
from tests.rollout.tiny_models import MAX_MODEL_LEN, STOP_TOKEN_IDS, TinyModel, random_prompt, stream

SIZES = {"samples_per_prompt": 3, "max_response_tokens": 12}
DRAWS = [
    {"record_id": f"r{i}", "prompt_token_ids": random_prompt(i, 4 + 3 * i), "labeled": i % 2 == 0, "seed": 50 * i}
    for i in range(5)
]


@pytest.fixture(scope="module")
def results(qwen3: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    settings = {
        "config": {"dtype": "float32", "kv_cache_gib": 0.0625, "max_num_seqs": 64, "max_num_batched_tokens": 1024},
        "max_model_len": MAX_MODEL_LEN,
        "stop_token_ids": STOP_TOKEN_IDS,
        "draws": DRAWS,
        **SIZES,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    worker = ["-m", "tests.rollout.replicas_worker", qwen3.folder, folder / "settings.json", folder]
    launch(worker, nproc=2, timeout_s=250, env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}).check()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor_parallel_size", "places"), [(1, [[2, 0, True], [2, 1, True]]), (2, [[1, 0, True], [1, 0, False]])]
)
def test_every_layout_samples_what_one_replica_samples(
    results: Path, tensor_parallel_size: int, places: list, qwen3_engine: RolloutEngine, qwen3: TinyModel
) -> None:
    ranks = [json.loads((results / f"tp{tensor_parallel_size}-rank{r}.json").read_text()) for r in range(2)]
    assert [r["place"] for r in ranks] == places
    assert ranks[0]["batch"] == ranks[1]["batch"]
    assert [r["environment"] for r in ranks] == ["2", "2"]
    assert [r["failure"] for r in ranks] == ["rollout: rank 1 failed: ValueError: bad bytes"] * 2

    qwen3_engine.update_weights(stream(qwen3.first), 1)
    draws = [PromptDraw(**draw) for draw in DRAWS]
    alone = rollout(
        qwen3_engine, draws, **SIZES, version=1, decode=lambda all_ids: [" ".join(map(str, ids)) for ids in all_ids]
    )
    batch = ranks[0]["batch"]
    torch.testing.assert_close(torch.tensor(batch.pop("rollout_log_probs")), alone.rollout_log_probs, rtol=0, atol=1e-5)
    for name, value in batch.items():
        expected = getattr(alone, name)
        assert value == (expected.tolist() if isinstance(expected, torch.Tensor) else expected), name
