from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

import tempo_megatron
from tempo_megatron.telemetry import environment as module
from tempo_megatron.telemetry.environment import environment


def test_versions_and_host() -> None:
    facts = environment()
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["tempo_megatron"] == tempo_megatron.__version__
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"megatron-core", "transformers"} <= set(facts["versions"])
    assert facts["host"]["cpus"] >= 1
    assert facts["host"]["memory_gib"] > 0.1
    assert len(facts["host"]["gpus"]) == torch.cuda.device_count()


def test_it_is_json_and_names_no_place_of_this_machine() -> None:
    text = json.dumps(environment())
    assert str(Path.home()) not in text
    assert str(Path(tempo_megatron.__file__).parent.parent) not in text
    assert platform.node() not in text


def test_commit_of_the_checkout_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "tempo_megatron"
    package.mkdir(parents=True)
    monkeypatch.setattr(module.tempo_megatron, "__file__", str(package / "__init__.py"))
    assert environment()["git"] is None
    (tmp_path / "site-packages" / ".git").mkdir()  # looks like a checkout, git says it is none
    assert environment()["git"] is None
