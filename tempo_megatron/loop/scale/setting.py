"""What a dry run at scale takes in place of what is not on this machine: models, prompts, Transformer Engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tempo_megatron.checkpoint.hf_read import load_hf_config
from tempo_megatron.config.check import check_config
from tempo_megatron.config.scaled import ScaledJob
from tempo_megatron.config.schema import Config
from tempo_megatron.data.encode import encode_prompts
from tempo_megatron.data.isolated import read_prompts_isolated
from tempo_megatron.data.tokenizer import load_tokenizer
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import resolve_init
from tempo_megatron.loop.data import prompt_pool
from tempo_megatron.loop.runtime import roles_of
from tempo_megatron.loop.scale.rows import DRAWS
from tempo_megatron.model.hf_tensors import Role
from tempo_megatron.parallel.shards import Grid
from tempo_megatron.rollout.limits import check_model

#: (labelled, token ids) of a prompt.
Prompt = tuple[bool, list[int]]


@dataclass(frozen=True)
class Setting:
    """A job as it can be walked through here.

    Attributes:
        config: with the torch layer spec.
        hf_dirs: by role, the folder with its config.json.
        prompts: of one step, read from the job's files; None where those are not here.
        notes: what was put in the place of what, a line each.
    """

    config: Config
    hf_dirs: dict[Role, Path]
    prompts: list[Prompt] | None
    notes: list[str]


def find_setting(config: Config, job: ScaledJob) -> Setting:
    """Look for the job's files, put others in the place of what is missing, and check the configuration.

    Raises:
        TempoError: what the job would be refused for; no config.json for a role.
    """
    if job.json is not None and not job.json.parent.is_dir():
        raise TempoError(f"command line: --json {job.json}: there is no folder {job.json.parent}")
    notes: list[str] = []
    hf_dirs: dict[Role, Path] = {}
    for role, settings in roles_of(config).items():
        hf_dirs[role], note = _hf_dir(role, settings.init, job.model)
        notes += note
    walked = {str(role): c.model_copy(update={"layer_spec": "torch"}) for role, c in roles_of(config).items()}
    config = config.model_copy(update=walked)
    notes.append("layers: those of layer_spec torch; Transformer Engine's are built on GPUs only")
    check_config(config, job.world_size, {str(role): folder for role, folder in hf_dirs.items()})
    hf_config = load_hf_config(hf_dirs["actor"])
    if config.stage != "sft":
        size, experts = config.rollout.tensor_parallel_size, config.rollout.expert_parallel
        weights = config.rollout.weights
        check_model(str(hf_dirs["actor"]), hf_config, size, on_cpu=False, expert_parallel=experts, weights=weights)
    prompts = None
    missing = [name for name in config.data.train_files if not Path(name).is_file()]
    if not missing and config.stage != "sft" and (hf_dirs["actor"] / "tokenizer.json").is_file():
        prompts = _read_prompts(config, hf_dirs["actor"], hf_config.vocab_size)
        notes.append(f"prompts: the first step's of {', '.join(config.data.train_files)}")
    elif config.stage == "sft":
        notes.append("demonstrations: lengths are made up")
    else:
        why = f"{missing[0]} is not here" if missing else f"{hf_dirs['actor']} has no tokenizer.json"
        notes.append(f"prompts: {why}, lengths are made up")
    notes += [f"{name}: {text}" for name, text in DRAWS.items()]
    return Setting(config, hf_dirs, prompts, notes)


def _hf_dir(role: Role, init: str, model: Path | None) -> tuple[Path, list[str]]:
    if Path(init).expanduser().exists():
        folder = Path(init).expanduser()
        return (folder if (folder / "config.json").is_file() else resolve_init(init, f"{role}.init").hf_dir), []
    if model is None:
        raise TempoError(
            f"{role}.init: {init!r} is not on this machine; --model DIR names a folder with its config.json"
        )
    if not (model / "config.json").is_file():
        raise TempoError(f"command line: --model {model} has no config.json")
    return model, [f"{role}: {model} stands for {init}, which is not here"]


def _read_prompts(config: Config, hf_dir: Path, vocab_size: int) -> list[Prompt]:
    """Of the run's first step."""
    data = config.data
    tokenizer = load_tokenizer(hf_dir, vocab_size)
    records = read_prompts_isolated(data.train_files, data.answer_types).records
    token_ids = encode_prompts(tokenizer, records, data.max_prompt_tokens, data.chat_template_kwargs)
    prompts: list[Prompt] = []
    for labeled, count in ((True, data.labeled_prompts_per_step), (False, data.unlabeled_prompts_per_step)):
        pool = prompt_pool(records, token_ids, config, labeled=labeled)
        if pool is not None:
            prompts += [(labeled, pool.token_ids[position]) for position in pool.sampler.draw(count)]
    return prompts


def telling_ranks(config: Config, world_size: int) -> tuple[int, ...]:
    """Of each layout the first rank, the stage behind it, the last stage, and the last rank of all."""
    ranks: set[int] = {world_size - 1}
    for settings in roles_of(config).values():
        stages = Grid.of(settings.parallel, world_size).line(0, "stages")
        ranks |= {stages[0], stages[min(1, len(stages) - 1)], stages[-1]}
    return tuple(sorted(ranks))
