"""Inputs and launching shared by the tests of the loop."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from tests.launching import ROOT, launch_ranks


@dataclass(frozen=True)
class Inputs:
    """A tiny task, an untrained policy and a critic with a random head."""

    folder: Path

    @property
    def train(self) -> Path:
        return self.folder / "data" / "train.parquet"


@dataclass(frozen=True)
class Case:
    name: str
    overrides: dict[str, Any]
    config: str = "configs/demo/tempo.yaml"
    ends_in_error: bool = False
    #: The last rank is asked to save and end at every boundary, or first at the boundary of this number, and the run
    #: started again.
    stops: bool | int = False
    #: vLLM has another last norm than it was sent.
    spoils: bool = False


def make_inputs(folder: Path, layers: int = 2) -> Inputs:
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForTokenClassification

    from tempo_megatron.demo.model import write_model
    from tempo_megatron.demo.task import write_task

    write_task(folder / "data", 0, sft_rows=8192)
    write_model(folder / "model", 0)
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(folder / "model")
    if layers != config.num_hidden_layers:
        config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    config.num_labels = 1
    critic = Qwen3ForTokenClassification(config)
    torch.nn.init.normal_(critic.score.weight, std=0.3)
    torch.nn.init.constant_(critic.score.bias, 0.5)
    critic.save_pretrained(folder / "critic")
    for file in (folder / "model").glob("*token*"):
        (folder / "critic" / file.name).write_bytes(file.read_bytes())
    return Inputs(folder)


def teach(inputs: Inputs, steps: int = 280, batch: int = 128) -> None:
    """Make the policy one that is right now and then, as some steps of sft do; an untrained one never is.

    In one process, without ranks that wait for each other: half the time of the stage.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = inputs.folder / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows = pq.read_table(inputs.folder / "data" / "sft.parquet").to_pylist()
    texts = tokenizer([row["prompt"] + row["response"] for row in rows])["input_ids"]
    ids = torch.tensor([[*text, tokenizer.eos_token_id] for text in texts])  # all of one length
    targets = ids.clone()
    targets[:, : len(rows[0]["prompt"])] = -100  # a token is a character
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - step / steps))
    for step in range(steps):
        chosen = (torch.arange(batch) + step * batch) % len(ids)
        model(input_ids=ids[chosen], labels=targets[chosen]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def small_tempo(inputs: Inputs, **changes: Any) -> dict[str, Any]:
    """Overrides that make configs/demo/tempo.yaml a run of a few seconds from the untrained models."""
    return {
        "actor.init": inputs.folder / "model",
        "critic.init": inputs.folder / "critic",
        "data.train_files": f"[{inputs.train}]",
        "data.labeled_prompts_per_step": 3,
        "data.unlabeled_prompts_per_step": 4,
        "rollout.samples_per_prompt": 3,
        "rollout.max_num_seqs": 64,
        "actor.max_tokens_per_microbatch": 40,
        "critic.max_tokens_per_microbatch": 48,
        "actor.optimizer.lr": 1e-3,
        "critic.optimizer.lr": 1e-3,
        "algorithm.gate.enabled": False,
        "evaluation.sets": "[]",
        "steps": 2,
        **changes,
    }


def run_cases(cases: list[Case], nproc: int, folder: Path, timeout_s: float) -> dict[str, dict[str, Any]]:
    """Run the cases one after the other on one set of ranks; what each one's rank 0 saw."""
    listing = [
        {
            "config": str(ROOT / case.config),
            "overrides": [f"{k}={v}" for k, v in {"output_dir": folder / case.name, **case.overrides}.items()],
            "out": str(folder / f"{case.name}.pt"),
            "ends_in_error": case.ends_in_error,
            "stops": case.stops,
            "spoils": case.spoils,
        }
        for case in cases
    ]
    file = folder / f"cases-{cases[0].name}.json"
    file.write_text(json.dumps(listing))
    launch_ranks("tests.loop.em_worker", file, nproc=nproc, timeout_s=timeout_s).check()
    # written by this test's own ranks a moment ago
    return {case.name: torch.load(folder / f"{case.name}.pt", weights_only=True) for case in cases}
