"""A conversion that is killed leaves nothing that loads, and does not stand in the way of the next one.

Between its last file and its name a folder is whole; killed there, a hidden folder with all that was to be written is
left.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import transformers as hf

from tempo_megatron.checkpoint.convert.command import hf_to_megatron, megatron_to_hf
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import resolve_init
from tests.checkpoint.convert_models import write_folder
from tests.launching import launch

KILLS = 10


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the converters set it


def folders(parent: Path) -> list[Path]:
    """Everything that a path could name: the targets, hidden folders, and what is inside."""
    return [path for path in parent.rglob("*") if path.is_dir()]


def loads(folder: Path) -> bool:
    try:
        resolve_init(str(folder), "actor.init")
        return True
    except TempoError:
        pass
    try:
        hf.AutoModelForCausalLM.from_pretrained(folder)
        return True
    except (OSError, ValueError):
        return False


def files(folder: Path) -> dict[str, int]:
    """Size by name; 0 for Megatron's metadata, which holds the folder's path and a random id."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size * (path.name != ".metadata") for path in found}


def test_killed_at_random_points(tmp_path: Path) -> None:
    source, there, targets = write_folder(tmp_path / "hf", "llama-tied"), tmp_path / "there", tmp_path / "targets"
    targets.mkdir()
    assert hf_to_megatron(["--hf", str(source), "--megatron", str(there)]) == 0
    commands = {
        "forth": (hf_to_megatron, ["--hf", str(source), "--megatron", "{target}", "--pp", "2"]),
        "back": (megatron_to_hf, ["--megatron", str(there), "--hf", "{target}", "--shard-gib", "0.00004"]),
    }
    job = {
        "folder": str(targets),
        "seed": 5,
        "kills": KILLS,
        "commands": {name: (command.__name__, arguments) for name, (command, arguments) in commands.items()},
    }
    worker = Path(__file__).with_name("convert_kill_worker.py")
    result = launch([worker, json.dumps(job)], nproc=1, timeout_s=120).check()
    told = json.loads(result.stdout.splitlines()[-1])
    for name, (command, arguments) in commands.items():
        assert told[name]["ends"] == [-signal.SIGKILL] * (KILLS + 1)
        whole, unnamed = targets / name / "0", targets / name / f".{KILLS + 1}.partial"
        assert loads(whole)
        assert files(unnamed) == files(whole)  # killed before it was renamed, with nothing else to do
        left = [path for path in folders(targets / name) if not {whole, unnamed} & {path, *path.parents}]
        assert any(path.name.startswith(".") for path in left)
        assert [path for path in left if loads(path) and files(path) != files(whole)] == []
        for i in (1, KILLS // 2, KILLS + 1):
            assert command([a.format(target=targets / name / str(i)) for a in arguments]) == 0
            assert files(targets / name / str(i)) == files(whole)
            assert not (targets / name / f".{i}.partial").exists()
