"""Inputs that the tests of the loop share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file, save_file


@dataclass(frozen=True)
class DemoInputs:
    """The demo's parquet files by name (``write_task``) and its untrained policy; for reading only."""

    data: dict[str, Path]
    model: Path


@pytest.fixture(scope="session")
def demo_inputs(tmp_path_factory: pytest.TempPathFactory) -> DemoInputs:
    from tempo_megatron.demo.model import write_model
    from tempo_megatron.demo.task import write_task

    folder = tmp_path_factory.mktemp("demo-inputs")
    return DemoInputs(write_task(folder / "data", 0, sft_rows=512), write_model(folder / "model", 0))


@dataclass(frozen=True)
class Bad:
    """Broken copies of the demo's inputs, all below ``folder``."""

    folder: Path
    good: DemoInputs

    def model(self, name: str) -> Path:
        return self.folder / "models" / name

    def data(self, name: str) -> Path:
        return self.folder / "data" / f"{name}.parquet"

    def config(self, stage: str) -> Path:
        return self.folder / f"{stage}.yaml"


@pytest.fixture(scope="module")
def bad(demo_inputs: DemoInputs, tmp_path_factory: pytest.TempPathFactory) -> Bad:
    bad = Bad(tmp_path_factory.mktemp("bad-input"), demo_inputs)
    _write_configs(bad)
    _write_data(bad)
    _write_models(bad)
    return bad


def _write_configs(bad: Bad) -> None:
    role = {"init": str(bad.good.model), "dtype": "float32", "max_tokens_per_microbatch": 4096}
    lengths = {"max_prompt_tokens": 8, "max_response_tokens": 8}
    sft = {
        "stage": "sft",
        "steps": 1,
        "actor": role,
        "data": {"train_files": [str(bad.good.data["sft"])], "sft_batch_size": 16, **lengths},
    }
    prompts = {"labeled_prompts_per_step": 2, "unlabeled_prompts_per_step": 2, **lengths}
    tempo = {
        "stage": "tempo",
        "steps": 1,
        "actor": role,
        "critic": {**role, "init_head": True},
        "data": {"train_files": [str(bad.good.data["train"])], **prompts},
        "rollout": {"dtype": "float32", "samples_per_prompt": 2, "kv_cache_gib": 0.01, "max_num_seqs": 16},
        "algorithm": {"preset": "paper", "estep": {"minibatches": 1}, "mstep": {"minibatches": 1}},
    }
    for settings in (sft, tempo):
        bad.config(str(settings["stage"])).write_text(yaml.safe_dump(settings))


def _write_data(bad: Bad) -> None:
    bad.data("x").parent.mkdir()
    table = pq.read_table(bad.good.data["train"])
    labeled = table.column("labeled")
    pq.write_table(table, bad.data("unanswered"))
    pq.write_table(table.drop_columns("source"), bad.data("no-column"))
    pq.write_table(table.filter(labeled), bad.data("no-unlabeled"))
    verl = [
        {"data_source": "amc", "prompt": prompt, "reward_model": {"ground_truth": truth}}
        for prompt, truth in (("1", "2.0"), ('2, after "####"', "3"))
    ]
    pq.write_table(pa.Table.from_pylist(verl), bad.data("form"))
    pq.write_table(table.filter(pc.invert(labeled)), bad.data("no-labeled"))
    longer = pa.array(["1" * 9, *table.column("prompt").to_pylist()[1:]])
    pq.write_table(table.set_column(table.schema.get_field_index("prompt"), "prompt", longer), bad.data("long"))
    whole = bad.good.data["train"].read_bytes()
    bad.data("truncated").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 4  # inside the first column's pages: the footer is fine
    bad.data("flipped").write_bytes(whole[: middle - 400] + bytes(800) + whole[middle + 400 :])
    pq.write_table(pq.read_table(bad.good.data["sft"]).slice(0, 100), bad.data("sft-100"))


def _write_models(bad: Bad) -> None:
    def derive(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> None:
        shutil.copytree(bad.good.model, bad.model(name))
        tensors = load_file(bad.good.model / "model.safetensors")
        change(tensors)
        save_file(tensors, bad.model(name) / "model.safetensors", metadata={"format": "pt"})

    derive("no-final-norm", lambda t: t.pop("model.norm.weight"))
    derive("wide-k", lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": np.zeros((65, 63), np.float32)}))
    derive("nan", lambda t: t["model.layers.0.mlp.down_proj.weight"].__setitem__((0, 0), np.nan))
    shutil.copytree(bad.good.model, bad.model("truncated"))
    with (bad.model("truncated") / "model.safetensors").open("r+b") as file:
        file.truncate(300_000)
    shutil.copytree(bad.good.model, bad.model("other-tokenizer"))
    tokenizer = bad.model("other-tokenizer") / "tokenizer.json"
    values = json.loads(tokenizer.read_text())
    values["model"]["vocab"] |= {f"word{i}": i for i in range(len(values["model"]["vocab"]), 64)}
    tokenizer.write_text(json.dumps(values))
    shutil.copytree(bad.good.model, bad.model("cut-off-generation"))
    (bad.model("cut-off-generation") / "generation_config.json").write_text("{\n")
    shutil.copytree(bad.good.model, bad.model("no-tokenizer-file"))
    (bad.model("no-tokenizer-file") / "tokenizer.json").unlink()
    shutil.copytree(bad.good.model, bad.model("template"))
    (bad.model("template") / "chat_template.jinja").write_text("{{ raise_exception('only tools are welcome') }}")
