"""A filled grid as JSON (ZebraLogic): ``{"House 1": {"Name": "Eric", "Drink": "tea"}, ...}``.

The final answer is the last complete JSON object of the response that has a grid's structure, or its ``solution`` or
``answer`` where it has one.  A key that is there twice makes it unreadable: which of the two is meant?  The whole
puzzle must be right; ``cell_accuracy`` is the share of the answer's cells that are.  Case and blanks don't count.  The
known answer is such an object, too, or ZebraLogic's ``{"header": [...], "rows": [[...], ...]}``.
"""

from __future__ import annotations

import json
from typing import Any

from tempo_megatron.verifiers.verdict import Kind, Verdict, itself
from tempo_megatron.verifiers.withdrawn import is_denied, is_withdrawn

Grid = dict[str, dict[str, str]]  # row -> column -> cell

_MAX_TAIL = 50_000  # characters of the response that are looked at
_MAX_SCANNED = 10**8  # characters that unsuccessful attempts may read altogether
_MAX_ROWS, _MAX_COLUMNS, _MAX_CELL = 50, 50, 200
_WRAPPERS = ("solution", "answer")


class _Doubled(dict[str, Any]):
    """An object with a key that is there twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Doubled(found)


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _last_object(text: str) -> dict[str, Any] | None:
    """The last complete JSON object that is not inside another one and may be meant as a grid; None if it is denied."""
    text, last, at, scanned = text[-_MAX_TAIL:], None, 0, 0
    start = end = 0
    while (at := text.find("{", at)) >= 0 and scanned < _MAX_SCANNED:
        begin = at
        try:
            found, at = _DECODER.raw_decode(text, at)
            if _may_be_grid(found):
                last, start, end = found, begin, at
        except json.JSONDecodeError as error:
            scanned += error.pos  # from the text's start: the error counts lines
            at += 1
        except (RecursionError, ValueError):  # too deep; a number of too many digits
            scanned += 20 * len(text)
            at += 1
    return None if is_denied(text[:start]) or is_withdrawn("." + text[end:]) else last


def _may_be_grid(found: dict[str, Any]) -> bool:
    """Also a malformed one, which takes back the one before; not ``{}`` or ``{"checked": true}``."""
    named = any(key.casefold() in (*_WRAPPERS, "header", "rows") for key in found)
    return named or isinstance(found, _Doubled) or any(isinstance(value, dict) for value in found.values())


def _grid(found: Any) -> Grid | None:
    """``found`` as a grid in normal form, or None when it has another structure."""
    found = _unwrapped(found)
    if _is_object(found) and isinstance(found.get("header"), list) and isinstance(found.get("rows"), list):
        found = _from_table(found["header"], found["rows"])
    if not _is_object(found) or not 0 < len(found) <= _MAX_ROWS:
        return None
    grid: Grid = {}
    for row, cells in found.items():
        if not _is_object(cells) or not 0 < len(cells) <= _MAX_COLUMNS:
            return None
        grid[_normal(row)] = {_normal(column): _cell(cell) for column, cell in cells.items()}
        if len(grid[_normal(row)]) < len(cells):
            return None
    return grid if len(grid) == len(found) else None


def _is_object(found: Any) -> bool:
    return isinstance(found, dict) and not isinstance(found, _Doubled)


def _unwrapped(found: Any) -> Any:
    """The ``solution`` or ``answer`` of an object that has one of them; None where it has two."""
    if not _is_object(found):
        return None
    inner = [value for key, value in found.items() if key.casefold() in _WRAPPERS and isinstance(value, dict)]
    return found if not inner else inner[0] if len(inner) == 1 else None


def _from_table(header: list[Any], rows: list[Any]) -> dict[str, Any] | None:
    if not all(isinstance(r, list) and len(r) == len(header) > 1 for r in rows):
        return None
    columns = [str(column) for column in header[1:]]
    return _object([(f"{header[0]} {r[0]}", _object(list(zip(columns, r[1:], strict=True)))) for r in rows])


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())[: _MAX_CELL + 1]


def _cell(value: Any) -> str:
    """Normal form of a cell; of anything but a string or an integer, a text that no answer has."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return "\0"
    text = _normal(value if isinstance(value, str) else json.dumps(value))
    return text if len(text) <= _MAX_CELL else "\0"


def _extract(response: str) -> str | None:
    grid = _grid(_last_object(response))
    return None if grid is None else json.dumps(grid, sort_keys=True)


def _known(answer: str) -> Grid | None:
    try:
        return _grid(json.loads(answer, object_pairs_hook=_object))
    except (ValueError, RecursionError):
        return None


def _grade(response: str, answer: str) -> Verdict:
    want, got = _known(answer), _grid(_last_object(response))
    assert want is not None  # answer_problem ran before
    if got is None:
        return Verdict(False, None, "no grid", {"cell_accuracy": 0.0})
    cells = [(row, column) for row, columns in want.items() for column in columns]
    right = sum(got.get(row, {}).get(column) == want[row][column] for row, column in cells)
    correct = right == len(cells)
    extracted = json.dumps(got, sort_keys=True)
    return Verdict(correct, extracted, f"{right} of {len(cells)} cells", {"cell_accuracy": right / len(cells)})


def _answer_problem(answer: str) -> str | None:
    grid = _known(answer)
    if grid is None:
        return 'not a JSON object {"House 1": {"Name": ...}, ...} or {"header": [...], "rows": [[...], ...]}'
    cells = [cell for columns in grid.values() for cell in columns.values()]
    return "a cell is not a short string or an integer" if "\0" in cells else None


KIND = Kind("json_grid", _grade, _answer_problem, _extract, state=itself)
