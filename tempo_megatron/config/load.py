"""YAML files and ``key=value`` overrides -> a validated ``Config``; every fault is told as one line.

A file may name others with ``base: other.yaml`` (or a list; relative to the file itself): mappings are
merged key by key, anything else is replaced, later files and then the command line win.

YAML is read by version 1.2's rules for plain scalars: ``1e-4`` is a number and ``off`` a word, which the
1.1 rules of PyYAML get the other way round.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from tempo_megatron.config.schema import Config
from tempo_megatron.config.section import Section
from tempo_megatron.errors import TempoError

KeyPath = tuple[str | int, ...]

COMMAND_LINE = "command line"

#: More than any configuration has.
MAX_VALUES = 100_000

# (tag, what a plain scalar looks like, its possible first characters); the first match wins
_PLAIN_SCALARS = (
    ("tag:yaml.org,2002:merge", r"<<", "<"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars; a key that stands twice in one mapping is an error."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (PyYAML's own protocol)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in (
                "tag:yaml.org,2002:str",
                "tag:yaml.org,2002:merge",
            ):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key_node.value in seen:
                problem = f"key '{key_node.value}' stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the strings that ``_Loader`` would read as something else."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012


for _tag, _pattern, _first in _PLAIN_SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> Config:
    """The validated settings of ``path``, its bases and ``overrides`` (``a.b.c=value``, value in YAML).

    A number in an override's key indexes a list: ``evaluation.sets.0.limit=3``. ``defaults`` are what the file is
    laid upon; None for ``path`` is an empty file.

    Raises:
        TempoError: one line with the file or "command line", the dotted key, the value and what would be right.
    """
    sources = _Sources(main=COMMAND_LINE if path is None else str(path))
    if path is not None:
        _read_with_bases(Path(path), sources, opened=())
    values: dict[str, Any] = _unshared(dict(defaults or {}))
    for _, mapping in sources.files:
        values = _merged(values, mapping)
    for override in overrides:
        sources.overrides.append((_apply_override(values, override), override))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise TempoError(_explain(error, sources)) from None


def dump_config(config: Config) -> str:
    """YAML with every key; ``load_config`` of it gives an equal ``Config``."""
    values = config.model_dump(mode="python")

    def dumped(*, unicode: bool) -> str:
        text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=unicode, width=120)
        return text

    text = dumped(unicode=True)
    # PyYAML writes these line breaks as they are and reads them as others
    return dumped(unicode=False) if any(c in text for c in "\x85\u2028\u2029") else text


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting; lists are values."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# ---------------------------------------------------------------- reading and merging


@dataclass
class _Sources:
    """Who said what, so that an error names the place to mend.

    Attributes:
        main: the file named by the user.
        files: (file name, its mapping) in the order of merging.
        overrides: (key path, the override as written) in the order of application.
    """

    main: str
    files: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    overrides: list[tuple[KeyPath, str]] = field(default_factory=list)

    def origin(self, at: KeyPath) -> str:
        for path, _ in reversed(self.overrides):
            shared = min(len(path), len(at))
            if path[:shared] == at[:shared]:  # the key itself, a section around it or a key of that section
                return COMMAND_LINE
        for name, mapping in reversed(self.files):
            if _holds(mapping, at):
                return name
        return self.main


def _holds(values: Any, at: KeyPath) -> bool:
    for part in at:
        keys = values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
        if part not in keys:
            return False
        values = values[part]
    return True


def _read_with_bases(path: Path, sources: _Sources, opened: tuple[Path, ...]) -> None:
    """Append the mappings of ``path``'s bases, then its own, to ``sources.files``."""
    real = path.resolve()
    if real in opened:
        chain = " -> ".join(p.name for p in (*opened[opened.index(real) :], real))
        raise TempoError(f"{opened[-1]}: base: {path.name} closes a circle: {chain}")
    mapping = _read_yaml(path)
    bases = mapping.pop("base", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise TempoError(f"{path}: base: {bases!r} must be a file name or a list of file names")
    for base in bases:
        file = path.parent / base
        if not file.is_file():
            raise TempoError(f"{path}: base: no such file: {file} (names are relative to the file that says base)")
        _read_with_bases(file, sources, (*opened, real))
    sources.files.append((str(path), mapping))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise TempoError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise TempoError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        found = "empty" if values is None else f"a {type(values).__name__}"
        raise TempoError(f"{path}: the file is {found}; a mapping is needed: 'stage: tempo', 'steps: 100', ...")
    return values


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return None
        if _expanded_size(node, {}) > MAX_VALUES:
            raise TempoError(f"{origin}: more than {MAX_VALUES} values once its aliases (*name) are written out")
        return _unshared(_Loader("").construct_document(node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and origin != COMMAND_LINE else ""
        raise TempoError(f"{origin}{line}: not valid YAML: {_one_line(error.problem or error.context)}") from None
    except RecursionError:
        raise TempoError(f"{origin}: nested too deeply (an alias that holds itself?)") from None
    except (yaml.YAMLError, ValueError) as error:  # ReaderError (control characters); an absurdly long integer
        raise TempoError(f"{origin}: not valid YAML: {_one_line(error)}") from None


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values ``node`` has with every alias written out; a few lines of aliases of aliases make billions."""
    if id(node) not in sizes:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        sizes[id(node)] = 1 + sum(_expanded_size(part, sizes) for part in inner)
    return sizes[id(node)]


def _unshared(values: Any) -> Any:
    """A copy in which two aliases of one YAML node are two objects: an override changes only the key it names."""
    if isinstance(values, dict):
        return {key: _unshared(value) for key, value in values.items()}
    return [_unshared(value) for value in values] if isinstance(values, list) else values


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def _apply_override(values: dict[str, Any], override: str) -> KeyPath:
    """Set one ``a.b.c=value`` in place; returns its path with list positions as int."""
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise TempoError(f"{COMMAND_LINE}: {override!r} must be key=value, such as actor.optimizer.lr=1e-6")
    try:
        value = _parse_yaml(text, COMMAND_LINE)
    except TempoError as error:
        raise TempoError(f"{COMMAND_LINE}: {override}: {str(error).removeprefix(f'{COMMAND_LINE}: ')}") from None
    node: Any = values
    path: list[str | int] = []
    for depth, part in enumerate(parts):
        here = ".".join(parts[:depth])
        key = _position(node, part, here, override) if isinstance(node, list) else part
        path.append(key)
        if depth == len(parts) - 1:
            node[key] = value
            break
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, (dict, list)):
            parent = ".".join(parts[: depth + 1])
            raise TempoError(f"{COMMAND_LINE}: {override}: {parent} is {_shown(node)}, which has no keys")
    return tuple(path)


def _position(values: list, part: str, dotted: str, override: str) -> int:
    if part.isdecimal() and int(part) < len(values):
        return int(part)
    valid = f"0 to {len(values) - 1}" if values else "nothing: it is empty"
    raise TempoError(f"{COMMAND_LINE}: {override}: {dotted} is a list; {part!r} is not one of its positions ({valid})")


# ---------------------------------------------------------------- telling what is wrong


def _explain(error: ValidationError, sources: _Sources) -> str:
    """All faults in one line, unknown keys first: they are often why another key is missing."""
    faults = error.errors(include_url=False)
    unknown = [f for f in faults if f["type"] == "extra_forbidden"]
    suggested = {_suggestion(f["loc"]) for f in unknown}
    others = [f for f in faults if f not in unknown and not (f["type"] == "missing" and _dotted(f["loc"]) in suggested)]
    lines = [f"{sources.origin(f['loc'])}: {_explain_one(f)}" for f in (*unknown, *others)]
    return "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")


def _explain_one(fault: Any) -> str:
    at, kind, value = fault["loc"], fault["type"], _shown(fault["input"])
    key = _dotted(at)
    if kind == "extra_forbidden":
        near = _suggestion(at)
        section = _section_at(at[:-1])
        valid = f"did you mean {near}?" if near else f"valid here: {', '.join(section.model_fields if section else ())}"
        return f"unknown key {key} (value {value}); {valid}"
    if kind == "missing":
        return f"{key}: missing{_description(at)}"
    if kind == "model_type":
        section = _section_at(at)
        return f"{key}: {value} must be a section with the keys {', '.join(section.model_fields if section else ())}"
    if kind == "value_error":  # a rule between the keys of a section: its text names them and their values
        return f"{key}: {_one_line(fault['ctx']['error'])}"
    if kind == "literal_error":
        return f"{key}: {value} must be one of {fault['ctx']['expected'].replace(' or ', ', ')}"
    return f"{key}: {value} {fault['msg'].replace('Input should', 'must', 1)}"


def _suggestion(at: KeyPath) -> str | None:
    """The valid dotted key that an unknown one most likely means."""
    section, word = _section_at(at[:-1]), str(at[-1])
    close = difflib.get_close_matches(word, section.model_fields if section else (), n=1, cutoff=0.5)
    if close:
        return _dotted((*at[:-1], close[0]))
    elsewhere = [key for key in _all_keys(Config) if key.rpartition(".")[2] == word]
    # the right word in the wrong section: prefer the place that shares most of the written path
    elsewhere.sort(key=lambda key: -len(_common_prefix(key, _dotted(at))))
    return elsewhere[0] if elsewhere else None


def _common_prefix(one: str, other: str) -> str:
    same = [a == b for a, b in zip(one, other, strict=False)]
    return one[: same.index(False)] if False in same else one[: len(same)]


def _section_at(at: KeyPath) -> type[Section] | None:
    section: type[Section] | None = Config
    named = False  # the next part is a key of a mapping
    for part in at:
        if isinstance(part, int) or named:
            named = False
            continue  # an item of a list or a mapping has the keys of its own annotation
        found = section.model_fields.get(part) if section else None
        section = _section_in(found.annotation) if found else None
        named = found is not None and get_origin(found.annotation) is dict
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    """The ``Section`` inside ``X``, ``X | None``, ``list[X]`` or ``dict[..., X]``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_in(arg))), None)


def _all_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield f"{prefix}{name}"
        inner = _section_in(info.annotation)
        if inner:
            yield from _all_keys(inner, f"{prefix}{name}.")


def _description(at: KeyPath) -> str:
    section = _section_at(at[:-1])
    info = section.model_fields.get(str(at[-1])) if section else None
    return f" ({info.description})" if info and info.description else ""


def _dotted(at: KeyPath) -> str:
    return ".".join(str(part) for part in at if part != "[key]")  # pydantic's mark of a mapping's key


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
