"""The kind that docs/adding_a_verifier.md makes does what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tempo_megatron.verifiers.verdict import Kind

PAGE = (Path(__file__).parents[2] / "docs" / "adding_a_verifier.md").read_text("utf-8")


def block(language: str) -> str:
    found = re.search(rf"(?ms)^```{language}\n(.*?)^```", PAGE)
    assert found is not None
    return found[1]


def test_the_example_is_a_kind_and_its_pairs_hold() -> None:
    names: dict[str, Any] = {}
    exec(block("python"), names)
    kind: Kind = names["KIND"]
    pairs = yaml.safe_load(block("yaml"))
    for section in ("equal", "unequal", "documented_false_rejects"):
        for answer, response in pairs[section]:
            assert kind.answer_problem(answer) is None
            verdict = kind.grade(response, answer)
            assert verdict.correct is (section == "equal")
            assert verdict.extracted == kind.extract(response)
    assert kind.answer_problem("14") == "not a Roman numeral"


def test_every_field_of_a_kind_is_told() -> None:
    fields = set(re.findall(r"(?m)^\| `(\w+)", PAGE))
    assert fields == set(Kind.__dataclass_fields__) - {"name"}
