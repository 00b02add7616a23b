"""What a run that goes on may change: its settings against those that its checkpoint was saved with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempo_megatron.checkpoint.critic_format import ACTIVATION
from tempo_megatron.checkpoint.digests import FileDigest, digest_file
from tempo_megatron.checkpoint.manifest import Manifest
from tempo_megatron.config.load import flat
from tempo_megatron.config.schema import Config
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import hf_name, resolve_init

#: Settings, or sections of them, that do not change what is trained, or that one changes to steer a run: listed.
#: Any other is refused unless ``resume_with_changes`` names it.
LISTED = (
    "steps",
    *(
        f"{role}.{key}"
        for role in ("actor", "critic")
        # weights and states are the checkpoint's; layouts and packing change rounding only
        for key in (
            "init",
            "layer_spec",
            "parallel",
            "optimizer",
            "max_tokens_per_microbatch",
            "recompute",
            "fp8.emulated",
        )
    ),
    "critic.init_head",
    "critic.initial_value",
    "rollout.tensor_parallel_size",
    "rollout.expert_parallel",
    "rollout.kv_cache_gib",
    "rollout.max_num_seqs",
    "rollout.max_num_batched_tokens",
    "rollout.bucket_mib",
    "rollout.max_log_prob_diff",
    "algorithm.preset",  # what it stands for is in keys of its own
    "verifier.workers",
    "verifier.timeout_s",
    "verifier.memory_limit_mib",
    "verifier.judge.base_url",
    "verifier.judge.api_key_env",
    "verifier.judge.timeout_s",
    "verifier.judge.retries",
    "evaluation",
    "checkpoint",
    "telemetry",
    "residency",
    "launch",
    "slurm",
    "watchdog",
)
#: Told by the line that says where the run goes on from.
UNTOLD = ("output_dir", "resume", "resume_with_changes")
#: Compared by what the files hold, not by their names.
FILES = ("data.train_files", "data.oracle_files")

DataDigests = Mapping[str, Mapping[str, FileDigest]]

_SHOWN = 5


@dataclass
class Changes:
    """``KEY: OLD -> NEW`` of what differs.

    Attributes:
        listed: harmless, or asked for.
        refused: neither.
    """

    listed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def digest_data(config: Config) -> dict[str, dict[str, FileDigest]]:
    """Setting -> file -> what it holds, for all files that are trained on. OSError if one cannot be read."""
    return {key: {name: digest_file(Path(name)) for name in _value(config.model_dump(), key)} for key in FILES}


def compare(checkpoint: Path, manifest: Manifest, config: Config, data: DataDigests, ranks: int) -> Changes:
    """What a run with ``config``, on so many ``ranks``, would change about the run that saved the checkpoint.

    A setting that one of the two does not know, or a section that one of them does not have, is not compared.

    Args:
        data: of ``digest_data``.
    """
    changes = Changes()
    wanted = config.resume_with_changes

    def note(key: str, text: str, *, harmless: bool) -> None:
        asked = wanted is True or (isinstance(wanted, list) and _is_in(key, wanted))
        (changes.listed if harmless or asked else changes.refused).append(f"{key}: {text}")

    if manifest.world_size != ranks:
        note("ranks", f"{manifest.world_size} -> {ranks}", harmless=True)
    old, new = dict(flat(manifest.config)), dict(flat(config.model_dump(mode="json")))
    for key in old:
        if key in new and old[key] != new[key] and not _is_in(key, (*UNTOLD, *FILES)):
            note(key, f"{_shown(old[key])} -> {_shown(new[key])}", harmless=_is_in(key, LISTED))
    for key in FILES:
        if key in old and old[key] + new[key]:
            told = _file_change(old[key], new[key], manifest.data.get(key, {}), data[key])
            if told is not None:
                note(key, told[0], harmless=told[1])
    for role in ("actor", "critic"):
        if f"{role}.init" in new and (difference := _model_change(checkpoint, role, new[f"{role}.init"])) is not None:
            note(f"{role}.init", difference, harmless=False)
    return changes


def refuse(checkpoint: Path, changes: Changes) -> None:
    """TempoError with the changes that are refused, if there are any."""
    if changes.refused:
        keys = ", ".join(text.partition(":")[0] for text in changes.refused)
        raise TempoError(
            f"{checkpoint}: saved with other settings than this run has: {shown(changes.refused)}; go on with the old "
            f"ones, start in another output_dir, or say resume_with_changes=[{keys}]"
        )


def goes_on(checkpoint: Path, changes: list[str]) -> str:
    """The line that tells where a run goes on from, and what it changes."""
    return f"resume: goes on from {checkpoint}" + (f"; changed since: {shown(changes)}" if changes else "")


def shown(changes: list[str]) -> str:
    """Some of them, in one line."""
    more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return "; ".join(changes[:_SHOWN]) + more


def _file_change(
    old: list[str], new: list[str], saved: Mapping[str, FileDigest], found: Mapping[str, FileDigest]
) -> tuple[str, bool] | None:
    """What differs between two lists of files, and whether only their names do."""
    if len(old) != len(new):
        return f"{len(old)} files -> {len(new)}", False
    for before, after in zip(old, new, strict=True):
        if before in saved and saved[before] != found[after]:
            name = before if before == after else f"{before} -> {after}"
            return f"what is in {name} has changed ({saved[before]} -> {found[after]})", False
    if old != new:
        return f"{_shown(old)} -> {_shown(new)}, which hold the same", True
    return None


def _model_change(checkpoint: Path, role: str, init: str) -> str | None:
    """How the model that a role names differs from the checkpoint's; None where it cannot be found any more."""
    try:
        source = resolve_init(init, f"{role}.init")
        given = json.loads((source.hf_dir / "config.json").read_text("utf-8"))
        own = json.loads((checkpoint / hf_name(role) / "config.json").read_text("utf-8"))
    except (TempoError, OSError, ValueError):
        return None  # it is not needed
    for key in sorted({*given, *own} - {"dtype", "torch_dtype", ACTIVATION, "transformers_version"}):
        if given.get(key) != own.get(key):
            return f"the checkpoint's model has {key} {_shown(own.get(key))}, {init} has {_shown(given.get(key))}"
    return None


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _is_in(key: str, sections: Any) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:20]}...{text[-37:]}"  # paths differ at their end
