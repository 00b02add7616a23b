"""A run that has done all it is asked for again, found out without loading anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tempo_megatron.checkpoint.manifest import seems_whole
from tempo_megatron.config.load import dump_config
from tempo_megatron.config.schema import Config
from tempo_megatron.locate import Position, newest_checkpoint
from tempo_megatron.telemetry.run_folder import CONFIG_FILE, INFO_FILE, read_info

#: Settings that do not change what a finished run has left.
BESIDE_THE_RUN = ("resume", "launch", "telemetry")


def finished_message(config: Config) -> str | None:
    """What to tell of ``output_dir`` where the very same run has ended in it with all its files there, or None.

    A run of other settings, one whose folder was moved, or one whose last checkpoint lacks something is not judged
    here: to resume it is to check it first.

    Raises:
        TempoError: run.json is broken.
    """
    output = Path(config.output_dir)
    newest = newest_checkpoint(output)
    if config.resume != "auto" or newest is None:
        return None
    finished = read_info(output / INFO_FILE).get("finished")
    if not finished or newest.name != str(Position(finished["step"])) or not _same_settings(config, output):
        return None
    if not seems_whole(newest):
        return None
    roles = ["actor"] if config.critic is None else ["actor", "critic"]
    if config.checkpoint.export_hf and not all((output / "hf" / r / "config.json").is_file() for r in roles):
        return None
    done = f"{finished['policy_updates']} policy updates, " if config.stage != "sft" else ""
    return (
        f"{output}: this run has ended ({done}step {finished['step']}, {newest.name}): nothing to do; "
        "to go on raise steps, to run it anew choose another output_dir"
    )


def _same_settings(config: Config, output: Path) -> bool:
    try:
        stored = yaml.safe_load((output / CONFIG_FILE).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(stored, dict) and _compared(stored) == _compared(yaml.safe_load(dump_config(config)))


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in BESIDE_THE_RUN}
