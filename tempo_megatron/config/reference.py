"""``docs/configuration.md`` from the schema.

Run ``python -m tempo_megatron.config.reference > docs/configuration.md`` after a change of the schema.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from tempo_megatron.config.algorithm import PRESETS
from tempo_megatron.config.schema import Config
from tempo_megatron.config.section import Section

INTRODUCTION = """\
# Configuration

<!-- Generated: python -m tempo_megatron.config.reference > docs/configuration.md -->

Every key of the YAML file that `tempo-megatron train --config FILE [key=value ...]` reads. A key that is not listed
here, a value of another type and a layout that does not divide are refused before any model is built.

- `base: other.yaml` (or a list of files, relative to the file that says it) is read first: sections are merged key by
  key, anything else is replaced. Overrides on the command line win over all files.
- An override is `dotted.key=value` with the value in YAML; a number indexes a list: `evaluation.sets.0.limit=64`.
- Plain scalars follow YAML 1.2: `1e-6` is a number, `off` is a word.
- Paths are relative to the folder that the command runs in.
- The configuration as it was resolved is in `config.yaml` of the run's folder. It can be given to `--config` again; all
  its keys are explicit, so that a preset has nothing left to fill in there.
"""

PRESETS_INTRODUCTION = """\
## Presets

What `algorithm.preset` sets; `docs/algorithm.md` says why. A key that the file or the command line gives wins. A dash:
the default above stays.
"""

#: Attributes of the constraints that ``Field(1, ge=1)`` leaves in a field's metadata.
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def render() -> str:
    """The whole page, Markdown."""
    parts = [INTRODUCTION, *_sections(Config, "", {}), PRESETS_INTRODUCTION + "\n" + _presets()]
    return "\n".join(parts)


def leaf_fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every setting that is not a section of its own; items of lists as ``key[]``, of
    mappings as ``key.NAME``.
    """
    for name, field in section.model_fields.items():
        inner, path = _inner_section(field.annotation), prefix + name
        if inner is None or get_origin(field.annotation) in (list, dict):
            yield path, field
        if inner is not None:
            yield from leaf_fields(inner, _inner_path(field, path) + ".")


def _sections(section: type[Section], path: str, written: dict[type[Section], str]) -> Iterator[str]:
    """The text of ``section`` and of those inside it; a class that was written already is referred to.

    Args:
        written: class -> the path that it was described under; added to.
    """
    lines = [f"## {f'`{path}`' if path else 'Top level'}\n"]
    base = next((c for c in section.__mro__ if c in written), None)
    if base is section:
        yield f"{lines[0]}\nThe keys of `{written[section]}`.\n"
        return
    fields = section.model_fields
    if base is not None:
        lines.append(f"The keys of `{written[base]}`, and:\n")
        fields = {name: field for name, field in fields.items() if name not in base.model_fields}
    elif path and section.__doc__:
        lines.append(f"{inspect.cleandoc(section.__doc__).replace('``', '`')}\n")
    rows = [
        _row(name, field)
        for name, field in fields.items()
        if _inner_section(field.annotation) is None or get_origin(field.annotation) in (list, dict)
    ]
    if rows:
        lines.append("| key | type | default | description |\n|---|---|---|---|\n" + "".join(rows))
    written[section] = path
    yield "\n".join(lines)
    for name, field in fields.items():
        inner = _inner_section(field.annotation)
        if inner is not None:
            yield from _sections(inner, _inner_path(field, f"{path}.{name}" if path else name), written)


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", _type(field), _default(field), field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(rule, name)
    ]
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(annotation: Any) -> str:
    """A type as a user of YAML would name it."""
    if annotation is NoneType:
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " / ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return "list of sections" if _inner_section(annotation) else f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"mapping of {' to '.join(map(_type_name, arguments))}"
    if origin is tuple:
        return "[" + ", ".join(map(_type_name, arguments)) + "]"
    if arguments:  # X | None
        return " or ".join(map(_type_name, arguments))
    return str(annotation.__name__)


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else _shown(field.default)


def _shown(value: Any) -> str:
    """A value as YAML would have it."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return "`null`" if value is None else f"`{value}`"


def _inner_section(annotation: Any) -> type[Section] | None:
    """The section in ``X``, ``X | None``, ``list[X]`` or ``dict[..., X]``; None for a plain setting."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _inner_section(part))), None)


def _inner_path(field: FieldInfo, path: str) -> str:
    return path + {list: "[]", dict: ".NAME"}.get(get_origin(field.annotation), "")  # type: ignore[arg-type]


def _presets() -> str:
    keys = dict.fromkeys(f"{s}.{k}" for preset in PRESETS.values() for s, changes in preset.items() for k in changes)
    names = [f"`{name}`" for name in PRESETS]
    lines = ["| " + " | ".join(["key", *names]) + " |\n|---" + "|---" * len(names) + "|\n"]
    for key in keys:
        section, name = key.split(".")
        cells = [
            _shown(preset[section][name]) if name in preset.get(section, {}) else "-" for preset in PRESETS.values()
        ]
        lines.append(f"| `algorithm.{key}` | " + " | ".join(cells) + " |\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.stdout.write(render())
