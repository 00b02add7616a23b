"""Peak memory of an EM step, by phase: with everything resident, with optimizers and vLLM that leave, with all leaving.

One rank, float32, a model and a critic of random weights; steps of a few short rows, so that what is resident outweighs
what a phase makes. The peak is the process's resident set.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Comparison, Contender, Prepare, Run, Spread, compare, started
from benchmarks.report import Figure, Options, Report, ahead_of
from tempo_megatron.config.load import load_config
from tempo_megatron.config.schema import Config

#: Contender -> the ``residency`` section.
MODES = {
    "nothing leaves": {"offload": "none", "sleep": "false"},
    "optimizers and vLLM leave": {"offload": "optimizer", "sleep": "true"},
    "all leave": {"offload": "all", "sleep": "true"},
}
STAYS, SOME, ALL = MODES


def run(options: Options) -> Report:
    hidden, layers = (128, 2) if options.small else (768, 6)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder)
        millions = write_inputs(inputs, hidden, layers) / 1e6
        contenders = [
            Contender(name, "benchmarks.residency:em_loop", {"inputs": folder, "name": name, "residency": mode})
            for name, mode in MODES.items()
        ]
        with started(contenders) as running:
            what = f"EM steps of an actor and a critic of {millions:.1f} million parameters each, float32"
            comparison = compare(what, {}, running, options.rounds, unit="steps")
    about = "Peak resident set of one rank in each phase of an EM step, and the bytes that were resident in it by part."
    details = {line.contender: line.facts for line in comparison.lines if line.failed is None}
    return Report("residency", about, [comparison], _figures(comparison), details)


def _figures(comparison: Comparison) -> list[Figure]:
    lines = {line.contender: line for line in comparison.lines if line.failed is None}
    figures = [
        Figure(f"peak of an EM step, {name}", _single(max(line.facts["peak_gib"].values())), "GiB")
        for name, line in lines.items()
    ]
    if STAYS in lines:
        figures += [
            Figure(
                f"peak of an EM step, {name}: what it is lower by, of the bytes that had left",
                _single(_saved(lines[STAYS].facts, line.facts)),
                "x",
                ">= 0.9",
            )
            for name, line in lines.items()
            if name != STAYS
        ]
    for name in (SOME, ALL):
        figures += ahead_of(comparison, name, f"speed of a step, nothing leaves against {name}")
    return figures


def _single(value: float) -> Spread:
    return Spread(value, value, value)


def _saved(stays: dict[str, Any], leaves: dict[str, Any]) -> float:
    """By how much the highest peak is lower, over what had left in the phase where the peak is."""
    peaks, resident = leaves["peak_gib"], leaves["resident_gib"]
    phase = max(peaks, key=peaks.__getitem__)
    left = max(sum(held.values()) for held in stays["resident_gib"].values()) - sum(resident[phase].values())
    return float(max(stays["peak_gib"].values()) - peaks[phase]) / left


def write_inputs(folder: Path, hidden: int, layers: int) -> int:
    """``data`` and ``model``: the demo's task, with a model of this size in the place of its own; its parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tempo_megatron.demo.model import write_model
    from tempo_megatron.demo.task import write_task

    write_task(folder / "data", 0, sft_rows=64)
    write_model(folder / "model", 0)
    config = AutoConfig.from_pretrained(folder / "model")
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "head_dim": 64}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    config.update({**sizes, **heads, "layer_types": ["full_attention"] * layers})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    return sum(p.numel() for p in model.parameters())


def config_of(settings: dict[str, Any]) -> Config:
    """Of a contender's run."""
    inputs = Path(settings["inputs"])
    values = {
        "output_dir": inputs / settings["name"].replace(" ", "-"),
        "actor.init": inputs / "model",
        "critic.init": inputs / "model",
        "critic.init_head": "true",
        "data.train_files": f"[{inputs / 'data' / 'train.parquet'}]",
        "data.labeled_prompts_per_step": 4,
        "data.unlabeled_prompts_per_step": 4,
        "rollout.samples_per_prompt": 4,
        "rollout.max_num_seqs": 64,
        "actor.max_tokens_per_microbatch": 128,
        "critic.max_tokens_per_microbatch": 128,
        "algorithm.gate.enabled": "false",
        "algorithm.guard.enabled": "false",
        "algorithm.estep.updates": 1,
        "evaluation.sets": "[]",
        "launch.threads_per_rank": settings.get("threads", 1),
        **{f"residency.{key}": value for key, value in settings["residency"].items()},
    }
    return load_config(ROOT / "configs" / "demo" / "tempo.yaml", [f"{key}={value}" for key, value in values.items()])


def em_loop(settings: dict[str, Any]) -> Prepare:
    """A run of stage ``tempo``; each measured run is one step of it."""
    from tempo_megatron.parallel import cpu_shim

    cpu_shim.install()
    from tempo_megatron.loop.em import EMLoop
    from tempo_megatron.loop.session import Session

    session = Session(config_of(settings))
    loop = EMLoop(session)
    loop.begin()

    def prepare(case: dict[str, Any]) -> Run:
        session.ledger.collect()

        def step() -> dict[str, Any]:
            loop.step += 1
            loop.train_step()
            parts = {name: part.nbytes() for name, part in session.residency._parts.items()}
            return {"work": 1, "bytes": parts, **_facts(session.ledger.collect(), session.ledger.memory_by_phase())}

        return step

    return prepare


def _facts(record: dict[str, float], memory: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Of one step, by phase: its peak, what was resident, its seconds."""
    phases = [key.removeprefix("memory/").removesuffix("_gib") for key in record if key.startswith("memory/")]
    return {
        "peak_gib": {phase: record[f"memory/{phase}_gib"] for phase in phases},
        "resident_gib": {p: {k: v for k, v in memory[p].items() if k != "peak"} for p in phases},
        "phase_seconds": {phase: record[f"time/{phase}_s"] for phase in phases},
    }
