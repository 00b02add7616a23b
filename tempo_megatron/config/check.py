"""What can be refused before a model is built: layouts that do not divide, files that are not there, stage rules.

Reads nothing but JSON, so that a job is refused on the login node as well as on every rank.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path

from tempo_megatron.checkpoint.manifest import DamagedCheckpoint, find_whole, refuse_all
from tempo_megatron.config.layout import ModelShape, check_fp8, check_layout, divisors, nearest, read_model_shape
from tempo_megatron.config.load import flat
from tempo_megatron.config.methods import METHODS, Method, estimator
from tempo_megatron.config.schema import Config, RoleConfig
from tempo_megatron.data.answer_kinds import check_answer_types
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import CHECKPOINTS, hf_name, resolve_checkpoint, resolve_init, step_folders


def check_config(config: Config, world_size: int, hf_dirs: Mapping[str, Path] | None = None) -> None:
    """Refuse what cannot run on ``world_size`` ranks.

    Args:
        hf_dirs: of a job that is only walked through (``loop.scale``), on a machine that need not have its files:
            the folder with each role's config.json. No other file is looked for then.

    Raises:
        TempoError: the first fault found: key, value and what would be right.
    """
    _check_stage(config)
    check_answer_types(config.data.answer_types)
    here = hf_dirs is None
    if here:
        _check_exist("data.train_files", config.data.train_files)
        _check_exist("data.oracle_files", config.data.oracle_files)
    _check_evaluation_sets(config, here=here)
    _check_output(config)
    _check_wanted_changes(config)
    checkpoint = resumed_from(config) if here else None
    actor = _check_models(config, world_size, checkpoint, packs=_is_rl(config), hf_dirs=hf_dirs)
    if _generates(config):
        _check_rollout(config, actor, world_size)


def check_evaluation(config: Config, world_size: int) -> None:
    """Refuse what cannot be evaluated on ``world_size`` ranks; what is only about training is not looked at.

    Raises:
        TempoError: as ``check_config``.
    """
    if not config.evaluation.sets:
        raise TempoError("evaluation.sets: [] is empty; give --set NAME=FILE, or a configuration with evaluation.sets")
    check_answer_types(config.data.answer_types)
    _check_evaluation_sets(config)
    _check_output(config)
    _check_rollout(config, _check_models(config, world_size, None, packs=True), world_size)


def check_mismatch(config: Config, world_size: int) -> None:
    """Refuse what ``doctor --mismatch`` cannot sample and score on ``world_size`` ranks.

    Raises:
        TempoError: as ``check_config``.
    """
    if not config.evaluation.sets:
        if not config.data.train_files:
            raise TempoError(
                "evaluation.sets: [] and data.train_files: [] are empty; give --set NAME=FILE, or a configuration with "
                "prompts"
            )
        _check_exist("data.train_files", config.data.train_files)
    check_answer_types(config.data.answer_types)
    _check_evaluation_sets(config)
    _check_output(config)
    _check_rollout(config, _check_models(config, world_size, None, packs=True), world_size)


def model_folders(config: Config) -> dict[str, Path]:
    """By role, the folder with the ``config.json`` that a run reads; of a configuration that ``check_config`` takes."""
    checkpoint = resumed_from(config)
    roles = {"actor": config.actor} | ({"critic": config.critic} if config.critic is not None else {})
    return {name: _hf_dir(name, role, checkpoint) for name, role in roles.items()}


def check_shapes(config: Config, shapes: Mapping[str, ModelShape], world_size: int) -> None:
    """Refuse models, by role, that layouts, lengths or the rollout's size do not go with; opens no file.

    Raises:
        TempoError: as ``check_config``.
    """
    for name, shape in shapes.items():
        role = config.actor if name == "actor" else config.critic
        assert role is not None
        check_layout(shape, role.parallel, f"{name}.parallel", world_size)
        check_fp8(shape, role, name)
        _check_lengths(config, name, shape, packs=_is_rl(config))
    if "critic" in shapes:
        _check_same_vocabulary(shapes["actor"], shapes["critic"])
    if _generates(config):
        _check_rollout(config, shapes["actor"], world_size)


# ---------------------------------------------------------------- stages and files


def _is_rl(config: Config) -> bool:
    return config.stage != "sft"


def _generates(config: Config) -> bool:
    return _is_rl(config) or bool(config.evaluation.sets)


def _check_stage(config: Config) -> None:
    data, stage = config.data, config.stage
    if not data.train_files:
        kind = "prompt+response" if stage == "sft" else "prompt"
        raise TempoError(f"data.train_files: [] is empty; stage {stage} needs at least one {kind} parquet file")
    if stage == "sft":
        if config.critic is not None:
            raise TempoError("critic: stage sft trains the actor alone; remove the section (or critic=null)")
        _check_nothing_leaves(config)
        return
    method = METHODS[stage]
    if method.critic and config.critic is None:
        raise TempoError(f"critic: missing; stage {stage} trains an actor and a critic: give at least critic.init")
    if not method.critic and config.critic is not None:
        raise TempoError(f"critic: stage {stage} trains the actor alone; remove the section (or critic=null)")
    labeled, unlabeled = data.labeled_prompts_per_step, data.unlabeled_prompts_per_step
    if method.labeled == "needed" and labeled == 0:
        raise TempoError(f"data.labeled_prompts_per_step: 0 must be at least 1 in stage {stage}")
    if method.unlabeled and unlabeled == 0:
        raise TempoError(f"data.unlabeled_prompts_per_step: 0 must be at least 1 in stage {stage}")
    if not method.unlabeled and unlabeled != 0:
        raise TempoError(
            f"data.unlabeled_prompts_per_step: {unlabeled} must be 0 in stage {stage}, which trains on D_L alone"
        )
    if method.asks == "truth" and not data.oracle_files:
        raise TempoError(f"data.oracle_files: [] is empty; stage {stage} needs the answers of the unlabelled prompts")
    if method.asks != "truth" and data.oracle_files:
        may = ", ".join(name for name, m in METHODS.items() if m.asks == "truth")
        raise TempoError(f"data.oracle_files: only stage {may} may read them; stage {stage} must not")
    _check_algorithm(config, method)


def _check_nothing_leaves(config: Config) -> None:
    residency = config.residency
    for key, given in (("offload", residency.offload), ("sleep", residency.sleep)):
        if given not in ("none", False):
            raise TempoError(
                f"residency.{key}: {json.dumps(given)} makes room for others, and stage sft has the actor alone; "
                "remove it"
            )


def _check_algorithm(config: Config, method: Method) -> None:
    algorithm, stage = config.algorithm, config.stage
    mstep, estep = algorithm.mstep, algorithm.estep
    if mstep.estimator is not None and mstep.estimator not in method.estimators:
        raise TempoError(
            f"algorithm.mstep.estimator: {mstep.estimator} must be {' or '.join(method.estimators)} in stage {stage}"
        )
    if estimator(config) == "group":
        if mstep.advantage == "scale":
            raise TempoError("algorithm.mstep.advantage: scale is of estimator token; with group: whiten or none")
        if config.rollout.samples_per_prompt == 1:
            raise TempoError(
                f"rollout.samples_per_prompt: 1 must be at least 2 in stage {stage}, which compares the samples of a "
                "prompt (algorithm.mstep.estimator group)"
            )
    if method.gated and algorithm.gate.enabled:
        _check_gate(config)
    _check_reward_terms(config)
    if config.critic is not None and config.critic.head == "sigmoid" and estep.value_clip is not None:
        raise TempoError(
            f"algorithm.estep.value_clip: {estep.value_clip} is for critic.head: regression; with sigmoid: null"
        )
    guard = algorithm.guard
    if guard.enabled and guard.action == "rollback" and method.unlabeled and config.checkpoint.every is None:
        raise TempoError("algorithm.guard.action: rollback needs checkpoints to go back to: set checkpoint.every")


def _check_gate(config: Config) -> None:
    """What would keep the gate shut for good."""
    algorithm, gate = config.algorithm, config.algorithm.gate
    if algorithm.estep.every is None:
        raise TempoError(
            "algorithm.estep.every: null never trains the critic, so algorithm.gate.enabled: true would never open; "
            "set it to false"
        )
    responses = config.data.labeled_prompts_per_step * config.rollout.samples_per_prompt
    if not algorithm.filter.enabled and responses < 2 * gate.min_per_class:
        raise TempoError(
            f"algorithm.gate.min_per_class: {gate.min_per_class} right and as many wrong responses are more than the "
            f"{responses} labelled ones of a step (data.labeled_prompts_per_step * rollout.samples_per_prompt): the "
            f"gate would never open; it can be at most {responses // 2}"
        )


def _check_reward_terms(config: Config) -> None:
    penalty, longest = config.algorithm.reward_terms.length_penalty, config.data.max_response_tokens
    if penalty is not None and penalty.buffer_tokens > longest:
        raise TempoError(
            f"algorithm.reward_terms.length_penalty.buffer_tokens: {penalty.buffer_tokens} must be at most "
            f"data.max_response_tokens {longest}"
        )


def _check_evaluation_sets(config: Config, *, here: bool = True) -> None:
    """``here``: their files are on this machine."""
    names = [s.name for s in config.evaluation.sets]
    for i, eval_set in enumerate(config.evaluation.sets):
        if not eval_set.files:
            raise TempoError(f"evaluation.sets.{i}.files: [] is empty; set {eval_set.name!r} needs a parquet file")
        if eval_set.name in names[:i]:
            raise TempoError(
                f"evaluation.sets.{i}.name: {eval_set.name!r} is the name of an earlier set; they must differ"
            )
        if here:
            _check_exist(f"evaluation.sets.{i}.files", eval_set.files)


def _check_wanted_changes(config: Config) -> None:
    if isinstance(config.resume_with_changes, list):
        keys = {f"{key}." for key, _ in flat(config.model_dump())}
        for wanted in config.resume_with_changes:
            if not any(key.startswith(f"{wanted}.") for key in keys):
                raise TempoError(
                    f"resume_with_changes: {wanted!r} is no setting of this run; give dotted keys or sections, such as "
                    "rollout.temperature or algorithm, or true for whatever has changed"
                )


def _check_output(config: Config) -> None:
    output = Path(config.output_dir)
    for folder in (output / CHECKPOINTS, output, *output.parents):
        if folder.exists() and not folder.is_dir():
            raise TempoError(f"output_dir: {config.output_dir!r}: {folder} is a file; a folder (new or old) is needed")


def _check_exist(key: str, files: list[str]) -> None:
    for i, name in enumerate(files):
        if not Path(name).is_file():
            found = "is a folder" if Path(name).is_dir() else "does not exist"
            raise TempoError(f"{key}.{i}: {name!r} {found}; a parquet file is needed (relative to {Path.cwd()})")


# ---------------------------------------------------------------- models and layouts


def resumed_from(config: Config) -> Path | None:
    """The checkpoint whose models a run goes on with: what can be told of it without reading its weights.

    Raises:
        TempoError: there are checkpoints, but the config.json and tokenizers of all of them are damaged.
    """
    if config.resume == "never":
        return None
    if config.resume != "auto":
        return _with_whole_configs(resolve_checkpoint(config.resume, "resume"), config)
    faults: list[DamagedCheckpoint] = []
    for folder in reversed(step_folders(config.output_dir)):
        try:
            return _with_whole_configs(folder, config)
        except DamagedCheckpoint as error:
            faults.append(error)
    refuse_all(faults)
    return None


def _with_whole_configs(folder: Path, config: Config) -> Path:
    roles = ["actor"] if config.critic is None else ["actor", "critic"]
    return find_whole(folder, {hf_name(role) for role in roles}).folder


def _check_models(
    config: Config,
    world_size: int,
    checkpoint: Path | None,
    *,
    packs: bool,
    hf_dirs: Mapping[str, Path] | None = None,
) -> ModelShape:
    """Every role and its layout; ``packs``: whole sequences go through them. Returns the actor's shape.

    Args:
        checkpoint: where the models come from, if not from where ``init`` says.
        hf_dirs: where each role's config.json is, whatever those say.
    """

    def checked(name: str, role: RoleConfig) -> ModelShape:
        hf_dir = _hf_dir(name, role, checkpoint) if hf_dirs is None else hf_dirs[name]
        return _check_role(name, role, world_size, hf_dir)

    shapes = {"actor": checked("actor", config.actor)}
    if config.critic is not None:
        shapes["critic"] = checked("critic", config.critic)
        _check_same_vocabulary(shapes["actor"], shapes["critic"])
    for name, shape in shapes.items():
        _check_lengths(config, name, shape, packs=packs)
    return shapes["actor"]


def _check_role(name: str, role: RoleConfig, world_size: int, hf_dir: Path) -> ModelShape:
    key = f"{name}.init"
    shape = read_model_shape(hf_dir / "config.json", key, critic=name == "critic")
    if role.fp8.is_on and not role.fp8.emulated and importlib.util.find_spec("transformer_engine") is None:
        raise TempoError(
            f"{name}.fp8.recipe: {role.fp8.recipe} needs the package transformer_engine, and a GPU; without them: "
            f"{name}.fp8.emulated: true, to study it"
        )
    if role.layer_spec == "te" and importlib.util.find_spec("transformer_engine") is None:
        raise TempoError(f"{name}.layer_spec: 'te' needs the package transformer_engine; without it: 'auto' or 'torch'")
    check_layout(shape, role.parallel, f"{name}.parallel", world_size)
    check_fp8(shape, role, name)
    return shape


def _hf_dir(name: str, role: RoleConfig, checkpoint: Path | None) -> Path:
    # one without the role is refused when all of it is looked at
    if checkpoint is not None and (checkpoint / hf_name(name)).is_dir():
        return checkpoint / hf_name(name)
    source = resolve_init(role.init, f"{name}.init")
    if source.kind == "checkpoint":
        find_whole(source.path, {source.hf_dir.name})
    return source.hf_dir


def _check_same_vocabulary(actor: ModelShape, critic: ModelShape) -> None:
    if actor.vocab_size != critic.vocab_size:
        raise TempoError(
            f"critic.init: vocab_size {critic.vocab_size} ({critic.file}) must equal the actor's {actor.vocab_size} "
            f"({actor.file}): both models read the same token ids"
        )


def _check_lengths(config: Config, name: str, shape: ModelShape, *, packs: bool) -> None:
    longest, told = _longest(config)
    if longest > shape.max_positions:
        raise TempoError(
            f"{told} must be at most max_position_embeddings {shape.max_positions} of {name}.init ({shape.file})"
        )
    role = config.actor if name == "actor" else config.critic
    if role is not None and packs and role.max_tokens_per_microbatch < longest:
        raise TempoError(
            f"{name}.max_tokens_per_microbatch: {role.max_tokens_per_microbatch} must be at least {longest}, "
            f"one longest sequence ({told})"
        )


def _check_rollout(config: Config, actor: ModelShape, world_size: int) -> None:
    size = config.rollout.tensor_parallel_size
    heads, kv_heads = actor.attention_heads, actor.key_value_heads
    # vLLM splits the KV heads over the ranks, or copies them where there are fewer heads than ranks
    valid = [t for t in divisors(math.gcd(heads, world_size)) if kv_heads % t == 0 or t % kv_heads == 0]
    if size not in valid:
        raise TempoError(
            f"rollout.tensor_parallel_size: {size} must divide the world size {world_size} and num_attention_heads "
            f"{heads}, and divide or be a multiple of num_key_value_heads {kv_heads} ({actor.file}); "
            f"nearest valid: {nearest(size, valid)}"
        )
    if config.rollout.weights == "fp8" and config.rollout.dtype != "bfloat16":
        raise TempoError(
            f"rollout.dtype: {config.rollout.dtype} must be bfloat16 with rollout.weights: fp8, whose kernels take it"
        )
    if config.rollout.max_num_batched_tokens < config.rollout.max_num_seqs:
        raise TempoError(
            f"rollout.max_num_batched_tokens: {config.rollout.max_num_batched_tokens} must be at least "
            f"{config.rollout.max_num_seqs}, one token of each response (rollout.max_num_seqs)"
        )


def _longest(config: Config) -> tuple[int, str]:
    """The longest sequence in tokens, and the keys that say so."""
    prompt, response = config.data.max_prompt_tokens, config.data.max_response_tokens
    longest = prompt + response
    return longest, f"data.max_prompt_tokens {prompt} + data.max_response_tokens {response} = {longest}"
