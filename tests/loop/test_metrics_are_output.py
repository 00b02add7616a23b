"""Nothing in the loop is steered by a metric's name: keys such as ``group/name`` are written, never read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import tempo_megatron

PACKAGE = Path(tempo_megatron.__file__).parent
#: Rooms that make metrics. ``telemetry`` and ``demo`` read the records of runs that are over, which is their work.
ROOMS = ("algorithm", "checkpoint", "loop", "rollout", "training")
FILES = sorted(file for room in ROOMS for file in (PACKAGE / room).rglob("*.py"))
KEY = re.compile(r"[a-z_|]+/[a-z_@]*")
#: Functions that put the prefix of keys which they write as their first argument.
WRITERS = {"summary_statistics"}


def metric_reads(tree: ast.AST) -> list[int]:
    """Lines with a string of a metric key's form that is neither a key of a dict display, nor assigned to, nor a
    writer's prefix.
    """
    written: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            written |= {id(part) for key in node.keys if key is not None for part in ast.walk(key)}
        elif isinstance(node, ast.DictComp):
            written |= {id(part) for part in ast.walk(node.key)}
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            written |= {id(part) for part in ast.walk(node.slice)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in WRITERS:
            written |= {id(part) for part in ast.walk(node.args[0])}
    strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [n.lineno for n in strings if KEY.fullmatch(n.value) and id(n) not in written]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_metric_is_read_by_its_key(file: Path) -> None:
    assert metric_reads(ast.parse(file.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "x = metrics['calibration/mean_value']",
        "x = metrics.get('reward/labeled_mean', 0.0)",
        "if 'critic/loss' in metrics: pass",
        "KEY = 'actor/entropy'",
        "x = metrics[f'guard/{name}']",
        "shown = {'auroc': 'calibration/auroc'}",
        "del metrics['actor/loss']",
    ],
)
def test_a_read_is_found(code: str) -> None:
    assert metric_reads(ast.parse(code)) == [1]


@pytest.mark.parametrize(
    "code",
    [
        "m = {'actor/loss': 1.0}",
        "m['gate/open'] = 1",
        "m = {f'guard/{n}': 1 for n in x}",
        "summary_statistics('reward/terminal', x, y)",
    ],
)
def test_a_write_is_not(code: str) -> None:
    assert metric_reads(ast.parse(code)) == []
