from __future__ import annotations

import re
from pathlib import Path

import pytest

from tempo_megatron.telemetry.labels import Label, evaluation_label, label_of, phase_label

PACKAGE = Path(__file__).parents[2] / "tempo_megatron"


@pytest.mark.parametrize(
    ("key", "text", "unit"),
    [
        ("sft/loss", "loss", "nats/token"),
        ("reward/terminal/mean", "reward, all rows", ""),
        ("response/tokens/max", "response length, max", "tokens"),
        ("eval/D_U/mean@16", "mean@16", "fraction"),
        ("eval/math/AIME 24/pass@8", "pass@8", "fraction"),
        ("eval/D_U/critic_best@4", "critic best@4", "fraction"),
        ("time/e_step_s", "E-step (critic)", "s"),
        ("time/evaluate held-out_s", "evaluating held-out", "s"),
        ("memory/rollout_gib", "sampling (vLLM)", "GiB"),
        ("throughput/m_step_tokens_per_s", "M-step (policy)", "tokens/s"),
        ("something/new", "something/new", ""),
        ("eval/D_U/new", "new", ""),
    ],
)
def test_label_of(key: str, text: str, unit: str) -> None:
    label = label_of(key)
    assert (label.text, label.unit) == (text, unit)


def test_meaning_names_the_k() -> None:
    assert "among 16" in evaluation_label("mean@16").meaning
    assert evaluation_label("other") == Label("other")


def test_every_phase_of_the_package_has_a_label() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    phases = set(re.findall(r'\.phase\(\s*f?"([\w]+)', source))
    assert len(phases) > 8
    assert not {phase for phase in phases if phase_label(phase) == phase}
