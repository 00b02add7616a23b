"""What a run says of itself: what it will do before it begins, and what it did and where when it has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tempo_megatron.config.methods import METHODS
from tempo_megatron.config.residency import NEEDS
from tempo_megatron.config.schema import Config, ParallelConfig, ResidencyConfig, RoleConfig
from tempo_megatron.locate import InitSource, newest_checkpoint
from tempo_megatron.loop.data import Pool, PromptData, SftData
from tempo_megatron.model.hf_tensors import Role
from tempo_megatron.telemetry.findings import critic_findings
from tempo_megatron.telemetry.labels import evaluation_label
from tempo_megatron.telemetry.progress import duration
from tempo_megatron.telemetry.results import Cell, Evaluations, evaluations_of, format_interval, format_number
from tempo_megatron.telemetry.run_folder import Finished, RunFolder

#: Figures of an evaluation that the last lines of a run repeat, by the beginning of their name.
TOLD = ("mean@", "pass@", "critic_auroc")

_LAYOUT = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
}


# ---------------------------------------------------------------- before


def plan(
    config: Config,
    roles: Mapping[Role, tuple[RoleConfig, InitSource]],
    data: PromptData | SftData,
    world_size: int,
    resumption: Sequence[str] = (),
) -> list[str]:
    """A line each on the goal, the models, the data, evaluations, what may hold the policy, and what is saved.

    Args:
        resumption: lines on the checkpoint that the run goes on from.
    """
    what = "optimizer steps" if config.stage == "sft" else "policy updates"
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    lines = [
        f"will make {config.steps} {what} of {config.stage} on {ranks}, seed {config.seed}, in {config.output_dir}"
    ]
    lines += resumption
    for role, (settings, source) in roles.items():
        kind = "HF folder" if source.kind == "hf" else "checkpoint"
        layout = layout_text(settings.parallel, world_size)
        lines.append(f"{role}: {source.path} ({kind}), {settings.dtype}, {layout}")
    lines += _data_lines(config, data)
    if config.stage != "sft":
        lines += _evaluation_lines(config, data) + _control_lines(config)
    return [*lines, *_residency_lines(config), _saving_line(config)]


def layout_text(layout: ParallelConfig, world_size: int) -> str:
    """``TP2 x PP2 x DP4``: what is more than 1, and the data parallelism that remains."""
    sizes = {name: getattr(layout, key) for name, key in _LAYOUT.items()}
    data_parallel = world_size // (sizes["TP"] * sizes["PP"] * sizes["CP"])
    return " x ".join([*(f"{name}{size}" for name, size in sizes.items() if size > 1), f"DP{data_parallel}"])


def _data_lines(config: Config, data: PromptData | SftData) -> list[str]:
    if isinstance(data, SftData):
        return [f"data: {len(data.prompts)} demonstrations, {config.data.sft_batch_size} a step"]
    settings = config.data
    pools = (
        ("D_L", data.labeled, settings.labeled_prompts_per_step),
        ("D_U", data.unlabeled, settings.unlabeled_prompts_per_step),
    )
    told = [f"{name} {_prompts(pool)}, {per_step} a step" for name, pool, per_step in pools if pool is not None]
    return [f"data: {'; '.join(told)}; {config.rollout.samples_per_prompt} responses to each"]


def _prompts(pool: Pool) -> str:
    return f"{len(pool.records)} prompts"


def _evaluation_lines(config: Config, data: PromptData | SftData) -> list[str]:
    if not isinstance(data, PromptData) or not data.eval_sets:
        return ["evaluation: none (evaluation.sets)"]
    sets = [f"{s.settings.name} ({len(s.records)} prompts x {s.settings.samples_per_prompt})" for s in data.eval_sets]
    times = ["at the start"] if config.evaluation.at_start else []
    times += [f"every {config.evaluation.every} updates"] if config.evaluation.every is not None else []
    times += ["at the end"] if config.evaluation.at_end else []
    return [f"evaluation: {', '.join(sets)}; {', '.join(times) or 'never (evaluation.every, at_start, at_end)'}"]


def _control_lines(config: Config) -> list[str]:
    method, gate, guard = METHODS[config.stage], config.algorithm.gate, config.algorithm.guard
    told = []
    if method.gated and gate.enabled:
        told.append(f"gate: no policy update before the critic's AUROC is {gate.auroc:g}")
    if method.unlabeled and guard.enabled:
        told.append(f"guard: {guard.action} where the policy collapses")
    return ["; ".join(told)] if told else []


def _residency_lines(config: Config) -> list[str]:
    what = {"none": [], "optimizer": ["gradients and optimizer states"], "all": ["actor and critic"]}
    leaves = [*what[config.residency.offload], *(["vLLM"] if config.residency.sleep else [])]
    return [f"leave the device while others work: {', '.join(leaves)}"] if leaves else []


def _saving_line(config: Config) -> str:
    every = config.checkpoint.every
    when = "at the end" if every is None else f"every {every} steps and at the end"
    return f"checkpoints: {when}" + ("; then HF folders" if config.checkpoint.export_hf else "")


# ---------------------------------------------------------------- after


def outcome(
    config: Config,
    run: RunFolder,
    finished: Finished,
    wall_s: float,
    peak_memory_gib: float,
    memory: Mapping[str, Mapping[str, float]],
) -> list[str]:
    """What was done and where, how the evaluations changed, and what must not go without a word.

    Args:
        run: the folder that the run has left.
        wall_s, peak_memory_gib, memory: of this process, rank 0; memory by phase as its ledger has it.
    """
    steps = f"{finished.policy_updates} policy updates in {finished.step} steps"
    done = f"{finished.step} steps" if config.stage == "sft" else steps
    lines = [f"done: {done}, {duration(wall_s)} since this start, {peak_memory_gib:.2f} GiB at most on rank 0"]
    if config.residency != ResidencyConfig():
        lines += _memory_lines(memory)
    evaluations = evaluations_of(run)
    if evaluations is not None:
        lines += _change_lines(evaluations)
    lines += [f"warning: {finding}" for finding in critic_findings(run)]
    lines.append(f"checkpoint: {newest_checkpoint(run.path)}")
    if config.checkpoint.export_hf:
        lines.append(f"HF folders: {run.path / 'hf'}")
    return lines


def _memory_lines(memory: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What was where: of the phases for which something leaves or comes."""
    lines = []
    for phase in NEEDS:
        if phase in memory:
            resident = {part: size for part, size in memory[phase].items() if part != "peak"}
            parts = ", ".join(f"{part} {size:.2f}" for part, size in resident.items())
            lines.append(
                f"memory in {phase}: {memory[phase]['peak']:.2f} GiB at most; resident {sum(resident.values()):.2f} "
                f"({parts})"
            )
    return lines


def _change_lines(evaluations: Evaluations) -> list[str]:
    first, last = evaluations.steps
    if first == last:
        return []
    lines = []
    for name, row in evaluations.results.rows.items():
        told = [
            f"{evaluation_label(metric).text} {_change(cell)}"
            for metric, cell in row.items()
            if metric.startswith(TOLD)
        ]
        lines.append(f"{name}, step {first} to {last}: {', '.join(told)}")
    return lines


def _change(cell: Cell) -> str:
    ends = f"{format_number(cell.start)} to {format_number(cell.final)}"
    change = f" ({format_number(cell.change, sign=True)})" if cell.change is not None else ""
    interval = format_interval(cell.interval)
    return f"{ends}{change[:-1]} {interval})" if change and interval else f"{ends}{change}"
