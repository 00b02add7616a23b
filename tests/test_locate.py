from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tempo_megatron.errors import TempoError
from tempo_megatron.locate import InitSource, newest_checkpoint, resolve_checkpoint, resolve_init


def hf_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").touch()
    return path


def checkpoint(run: Path, step: int, complete: bool = True) -> Path:
    path = run / "checkpoints" / f"step_{step:08d}"
    (path / "hf").mkdir(parents=True)
    (path / "hf" / "config.json").write_text("{}")
    if complete:
        (path / "manifest.json").write_text("{}")
    return path


def refusal(path: Path, key: str = "actor.init") -> str:
    with pytest.raises(TempoError) as caught:
        resolve_init(str(path), key)
    message = str(caught.value)
    assert message.startswith(f"{key}: ")
    assert "\n" not in message
    return message


def test_newest_is_the_highest_complete_step(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9)
    expected = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, complete=False)
    (tmp_path / "checkpoints" / "step_00000012.tmp").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").touch()
    assert newest_checkpoint(tmp_path) == expected


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    checkpoint(tmp_path, 99_999_999)
    expected = checkpoint(tmp_path, 100_000_000)
    assert newest_checkpoint(tmp_path) == expected


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 1, complete=False)
    assert newest_checkpoint(tmp_path) is None


def test_hf_folder(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "model")
    assert resolve_init(str(folder), "actor.init") == InitSource("hf", folder, folder)


def test_checkpoint_and_run_folder_give_the_same_source(tmp_path: Path) -> None:
    checkpoint(tmp_path, 3)
    newest = checkpoint(tmp_path, 7)
    expected = InitSource("checkpoint", newest, newest / "hf")
    assert resolve_init(str(newest), "critic.init") == expected
    assert resolve_init(str(tmp_path), "critic.init") == expected


def test_refusals_name_what_is_missing(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "Qwen" / "Qwen3-8B")
    (tmp_path / "file").touch()
    assert "is a file, not a folder" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty")
    (hf_folder(tmp_path / "old") / "model.safetensors").unlink()
    assert "no *.safetensors" in refusal(tmp_path / "old", "critic.init")
    (tmp_path / "old" / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is a pickle, which can run code and is not read: convert" in refusal(tmp_path / "old")
    half = checkpoint(tmp_path / "run", 5, complete=False)
    assert "not a complete checkpoint" in refusal(half)
    assert "no complete checkpoint" in refusal(tmp_path / "run")
    damaged = checkpoint(tmp_path / "run", 6)
    (damaged / "hf" / "config.json").unlink()
    assert "no hf/config.json" in refusal(damaged)


def test_resume_takes_checkpoints_only(tmp_path: Path) -> None:
    newest = checkpoint(tmp_path / "run", 2)
    assert resolve_checkpoint(str(newest), "resume") == newest
    assert resolve_checkpoint(str(tmp_path / "run"), "resume") == newest
    with pytest.raises(TempoError, match=r"^resume: .*neither a checkpoint .* nor a run folder"):
        resolve_checkpoint(str(hf_folder(tmp_path / "model")), "resume")


def test_torch_is_not_needed() -> None:
    code = "import sys, tempo_megatron.locate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
