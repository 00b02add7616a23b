"""Where weights come from and where checkpoints lie; reads names only, loads nothing (no torch).

Layout of a run: ``RUN/checkpoints/step_00000010/``, or ``step_00000010+estep/`` for one within the step after it.  A
checkpoint is complete iff it holds ``manifest.json`` (written last); its ``hf/`` holds the actor's ``config.json`` and
tokenizer, ``hf-critic/`` those of the critic.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

from tempo_megatron.errors import TempoError

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
HF = "hf"

#: Phases of a step after which a run can be saved, in their order.
Phase = Literal["rollout", "estep", "mstep"]
PHASES: tuple[Phase, ...] = get_args(Phase)

_NAME = re.compile(rf"step_([0-9]+)(?:\+({'|'.join(PHASES)}))?")


class Position(NamedTuple):
    """How far a run is; positions compare in their order.

    Attributes:
        step: steps that are complete.
        phases: of the next step, how many of ``PHASES`` are done.
    """

    step: int
    phases: int = 0

    @classmethod
    def after(cls, step: int, phase: Phase | None) -> Position:
        """``step`` steps are complete, and the next one up to and with its ``phase``."""
        return cls(step, 0 if phase is None else PHASES.index(phase) + 1)

    @property
    def phase(self) -> Phase | None:
        """The last phase that is done of a step that is not complete."""
        return PHASES[self.phases - 1] if self.phases else None

    def __str__(self) -> str:
        """The name of its checkpoint's folder."""
        return f"step_{self.step:08d}" + (f"+{self.phase}" if self.phases else "")


@dataclass(frozen=True)
class InitSource:
    """Where a role's first weights lie.

    Attributes:
        kind: "hf" (safetensors) or "checkpoint" (one of ours).
        path: the folder with the weights.
        hf_dir: the folder with config.json and the tokenizer files.
    """

    kind: Literal["hf", "checkpoint"]
    path: Path
    hf_dir: Path


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """The complete checkpoint of the latest position below ``run_dir``, or None."""
    complete = [folder for folder in step_folders(run_dir) if is_complete(folder)]
    return complete[-1] if complete else None


def step_folders(run_dir: str | Path) -> list[Path]:
    """``RUN/checkpoints/step_*``, complete or not, by their position."""
    return [path for _, path in positions(run_dir)]


def positions(run_dir: str | Path) -> list[tuple[Position, Path]]:
    """As ``step_folders``, with their positions."""
    folder = Path(run_dir) / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted((position, path) for path in folder.iterdir() if (position := position_of(path)) is not None)


def position_of(checkpoint_dir: Path) -> Position | None:
    """The position that a checkpoint folder's name says; None for other names."""
    match = _NAME.fullmatch(checkpoint_dir.name)
    return Position.after(int(match[1]), cast("Phase | None", match[2])) if match else None


def is_complete(checkpoint_dir: Path) -> bool:
    return (checkpoint_dir / MANIFEST).is_file()


def resolve_checkpoint(path: str, key: str) -> Path:
    """The checkpoint folder that ``path`` names: itself, or the newest complete one of a run folder.

    Raises:
        TempoError: naming the config ``key``, when there is none or it is not complete.
    """
    folder = _existing_folder(path, key)
    if is_complete(folder):
        return folder
    if position_of(folder) is not None:
        raise TempoError(f"{key}: {path!r} is not a complete checkpoint: it has no {MANIFEST}")
    if (folder / CHECKPOINTS).is_dir():
        newest = newest_checkpoint(folder)
        if newest is None:
            raise TempoError(f"{key}: {path!r} has no complete checkpoint ({CHECKPOINTS}/step_*/{MANIFEST})")
        return newest
    raise TempoError(f"{key}: {path!r} is neither a checkpoint (no {MANIFEST}) nor a run folder (no {CHECKPOINTS}/)")


def resolve_init(path: str, key: str) -> InitSource:
    """What ``path`` holds: an HF folder, one of our checkpoints, or a run (its newest complete checkpoint).

    Raises:
        TempoError: naming the config ``key`` (such as ``actor.init``), the path and what is missing.
    """
    folder = _existing_folder(path, key)
    if (folder / "config.json").is_file():
        if not any(folder.glob("*.safetensors")):
            raise TempoError(f"{key}: {path!r} has a config.json but {no_weights_reason(folder)}")
        return InitSource("hf", folder, folder)
    if not (is_complete(folder) or (folder / CHECKPOINTS).is_dir() or position_of(folder) is not None):
        raise TempoError(
            f"{key}: {path!r} has no config.json; give an HF folder (config.json, *.safetensors), "
            f"a checkpoint ({MANIFEST}) or a run folder ({CHECKPOINTS}/)"
        )
    checkpoint = resolve_checkpoint(path, key)
    hf_dir = checkpoint / hf_name(key.partition(".")[0])
    if not hf_dir.is_dir():  # a critic that starts from a stage without one
        hf_dir = checkpoint / HF
    if not hf_dir.is_dir() and (checkpoint / hf_name("critic")).is_dir():
        raise TempoError(f"{key}: checkpoint {checkpoint} holds a critic only")
    if not (hf_dir / "config.json").is_file():
        raise TempoError(f"{key}: checkpoint {checkpoint} is damaged: it has no {hf_dir.name}/config.json")
    return InitSource("checkpoint", checkpoint, hf_dir)


def no_weights_reason(folder: Path) -> str:
    """Why an HF folder without safetensors is refused."""
    pickles = sorted(folder.glob("*.bin"))
    if pickles:
        return (
            f"no *.safetensors file; {pickles[0].name} is a pickle, which can run code and is not read: convert it "
            "(load it with transformers where you trust it, and save_pretrained)"
        )
    return "no *.safetensors file (nothing else is read)"


def hf_name(role: str) -> str:
    """Name of the folder with a role's config and tokenizer in a checkpoint."""
    return HF if role == "actor" else f"{HF}-{role}"


def _existing_folder(path: str, key: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    found = "is a file, not a folder" if folder.exists() else "does not exist (models are not fetched from a hub)"
    raise TempoError(f"{key}: {path!r} {found}; give an HF folder, a checkpoint folder or a run folder")
