from __future__ import annotations

from pathlib import Path
from typing import Any

from tempo_megatron.config.algorithm import PRESETS, RewardTermsConfig
from tempo_megatron.config.reference import leaf_fields, render
from tempo_megatron.config.schema import Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def settings(values: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted keys of a dumped configuration that are not sections."""
    keys: set[str] = set()
    for name, value in values.items():
        keys |= settings(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name}
    return keys


def test_the_committed_page_is_up_to_date() -> None:
    told = "run: python -m tempo_megatron.config.reference > docs/configuration.md"
    assert PAGE.read_text("utf-8") == render(), told


def test_every_key_of_a_configuration_is_a_field_of_the_page() -> None:
    role = {"init": "models/a"}
    config = Config.model_validate({
        "stage": "tempo", "output_dir": "runs/x", "steps": 1, "actor": role, "critic": {**role, "init_head": True},
        "algorithm": {"reward_terms": {name: {} for name in RewardTermsConfig.model_fields}},
    })  # fmt: skip
    fields = dict(leaf_fields(Config))
    assert {key for key in fields if "[]" not in key and ".NAME" not in key} == settings(config.model_dump())
    assert "evaluation.sets[].files" in fields
    page = render()
    assert [key for key in fields if f"| `{key.rpartition('.')[2]}` |" not in page] == []


def test_every_key_has_a_description() -> None:
    assert [key for key, field in leaf_fields(Config) if not field.description] == []


def test_rows_show_type_bounds_default_and_escaped_bars() -> None:
    page = render()
    assert "| `top_p` | float, > 0, <= 1 | `1.0` |" in page
    assert "| `steps` | int, >= 1 | required |" in page
    assert "| `value_clip` | float or null, > 0 | `null` |" in page
    assert "mean \\|log p(vLLM) - log p(Megatron)\\| above" in page


def test_presets_are_the_schema_s() -> None:
    rows = {line.split("`")[1]: line for line in render().splitlines() if line.startswith("| `algorithm.")}
    assert set(rows) == {f"algorithm.{s}.{k}" for p in PRESETS.values() for s, changes in p.items() for k in changes}
    assert rows["algorithm.estep.order"] == "| `algorithm.estep.order` | `before` | `after_values` | `before` |"
