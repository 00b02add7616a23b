"""``train --dry-run``: all that can be checked without building a model, by one process that starts no ranks.

The readers are those of the run itself, so that what is refused here is what the run would refuse, in the same words.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from transformers import PretrainedConfig

from tempo_megatron.checkpoint.changes import compare, digest_data, goes_on, refuse
from tempo_megatron.checkpoint.critic_format import ACTIVATION, check_activation, open_hf_folder
from tempo_megatron.checkpoint.hf_check import check_hf_folder
from tempo_megatron.checkpoint.hf_read import load_hf_config
from tempo_megatron.checkpoint.load import check_resumable
from tempo_megatron.checkpoint.manifest import read_manifest
from tempo_megatron.config.check import resumed_from
from tempo_megatron.config.load import dump_config
from tempo_megatron.config.schema import Config, CriticConfig, RoleConfig
from tempo_megatron.data.prompts import read_eval_answers
from tempo_megatron.data.tokenizer import load_tokenizer, stop_token_ids
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import InitSource, hf_name, resolve_init
from tempo_megatron.loop.announce import plan
from tempo_megatron.loop.data import read_data
from tempo_megatron.loop.runtime import roles_of
from tempo_megatron.model.hf_tensors import Role, expected_tensors
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.parallel.distributed import start
from tempo_megatron.planner.refuse import short_lines
from tempo_megatron.rollout.limits import check_model

NOT_CHECKED = (
    "not checked: the values of weights, the digests of checkpoints, the memory of another cluster (tempo-megatron "
    "plan), vLLM itself"
)


def dry_run(config: Config, world_size: int) -> None:
    """Print the resolved configuration on stdout, and on stderr what the run would do and what was checked.

    Args:
        config: has passed ``config.check.check_config``.
        world_size: ranks of the job.

    Raises:
        TempoError: what the run would refuse.
    """
    start(config.launch.threads_per_rank, config.launch.timeout_s)
    checkpoint = resumed_from(config)
    roles = {role: (c, _source(role, c, checkpoint)) for role, c in roles_of(config).items()}
    resumption = [] if checkpoint is None else [_check_resumption(checkpoint, config, world_size)]
    hf_configs = {role: load_hf_config(source.hf_dir) for role, (_, source) in roles.items()}
    checked = ["configuration: keys, types, rules of the stage, layouts"]
    checked += [_check_weights(role, *roles[role], hf_configs[role]) for role in roles]
    hf_dir, hf_config = roles["actor"][1].hf_dir, hf_configs["actor"]
    tokenizer = load_tokenizer(hf_dir, hf_config.vocab_size)
    stops = stop_token_ids(hf_dir, tokenizer, hf_config.vocab_size)
    checked.append(f"tokenizer: {len(tokenizer)} tokens, responses end with {tokenizer.convert_ids_to_tokens(stops)}")
    checked += _check_rollout(config, str(hf_dir), hf_config)
    data = read_data(config, tokenizer)
    for files in (*(s.files for s in config.evaluation.sets), config.data.oracle_files):
        if files:
            read_eval_answers(files)  # in a run it is the verifier that reads these
    checked.append("data: every row read, answers of their kinds, chat template applied, lengths within the limits")

    print(dump_config(config), end="")
    for line in plan(config, roles, data, world_size, resumption):
        _say(line)
    for line in checked:
        _say(f"checked: {line}")
    for line in short_lines(config, world_size):
        _say(line)
    _say(NOT_CHECKED)


def _source(role: Role, settings: RoleConfig, checkpoint: Path | None) -> InitSource:
    if checkpoint is None:
        return resolve_init(settings.init, f"{role}.init")
    return InitSource("checkpoint", checkpoint, checkpoint / hf_name(role))


def _check_resumption(checkpoint: Path, config: Config, world_size: int) -> str:
    """The line that tells of it."""
    manifest = read_manifest(checkpoint)
    check_resumable(checkpoint, manifest, roles_of(config), config.stage)
    changes = compare(checkpoint, manifest, config, digest_data(config), world_size)
    refuse(checkpoint, changes)
    return goes_on(checkpoint, changes.listed)


def _check_weights(role: Role, settings: RoleConfig, source: InitSource, hf_config: PretrainedConfig) -> str:
    init_head = isinstance(settings, CriticConfig) and settings.init_head
    if source.kind == "checkpoint":
        held = read_manifest(source.path).roles
        if role not in held and not (role == "critic" and init_head):
            raise TempoError(f"{role}.init: {source.path} holds no {role} (roles: {held})")
        return f"{role}: manifest of {source.path}"
    try:
        fresh_head = check_hf_folder(open_hf_folder(source.path, role), hf_config, role, init_head=init_head)
        if isinstance(settings, CriticConfig) and not fresh_head:
            check_activation(getattr(hf_config, ACTIVATION, None), settings.head, str(source.path))
    except TempoError as error:
        raise TempoError(f"{role}.init: {error}") from error
    shapes = expected_tensors(hf_config, role).values()
    count = sum(math.prod(shape) for shape in shapes)
    head = ", the value head is fresh" if fresh_head else ""
    return f"{role}: headers of {source.path}: {len(shapes)} tensors, {count:,} parameters{head}"


def _check_rollout(config: Config, hf_dir: str, hf_config: PretrainedConfig) -> list[str]:
    """What vLLM cannot run: refused; said only, where it is about the CPU of this machine and the job's may have GPUs
    or about stages that come after this one.
    """
    size, experts = config.rollout.tensor_parallel_size, config.rollout.expert_parallel
    weights = config.rollout.weights
    if config.stage != "sft":
        check_model(hf_dir, hf_config, size, on_cpu=False, expert_parallel=experts, weights=weights)
    try:
        check_model(hf_dir, hf_config, size, on_cpu=not use_cuda(), expert_parallel=experts, weights=weights)
    except TempoError as error:
        return [f"vLLM: warning: {error}"]
    return ["vLLM: takes the sizes of this model"]


def _say(line: str) -> None:
    print(line, file=sys.stderr)
