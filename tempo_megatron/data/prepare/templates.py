r"""Prompt templates: plain text with fields in braces.

``{problem}`` is the problem, ``{options}`` the choices one a line, ``{shape}`` the JSON to fill in.  A brace after a
letter or another brace belongs to LaTeX (``\boxed{}``, ``\frac{a}{b}``) and is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tempo_megatron.errors import TempoError

FIELDS = ("problem", "options", "shape")

_STEPS = "Reason step by step"

#: By name.  ``--template`` takes one of these names or a file.
BUILT_IN: dict[str, str] = {
    "math": f"{{problem}}\n\n{_STEPS}, and put your final answer within \\boxed{{}}.",
    "choice": f"{{problem}}\n\n{{options}}\n\n{_STEPS}, and put the letter of your choice within \\boxed{{}}.",
    "choices": f"{{problem}}\n\n{{options}}\n\nOne or more options are right. {_STEPS}, and put the letters of all of"
    " them, without separators, within \\boxed{}.",
    "choice-listed": f"{{problem}}\n\n{_STEPS}, and put the letter of your choice within \\boxed{{}}.",
    "choices-listed": f"{{problem}}\n\nOne or more options are right. {_STEPS}, and put the letters of all of them,"
    " without separators, within \\boxed{}.",
    "text": f"{{problem}}\n\n{_STEPS}, and put your final answer, and nothing else, within \\boxed{{}}.",
    "grid": f"{{problem}}\n\n{_STEPS}. Then give the solution as JSON, every ___ filled in:\n\n{{shape}}",
    "plain": "{problem}",
}

#: The built-in template that suits a kind whose data set names none.
OF_KIND = {
    "int": "math",
    "math": "math",
    "choice": "choice-listed",
    "text": "text",
    "exact": "text",
    "brackets": "text",
}

_FIELD = re.compile(r"(?<![A-Za-z}])\{([a-z_]+)\}")


def load_template(name_or_file: str) -> str:
    """A built-in template, or the text of a file without its final line break.

    Raises:
        TempoError: neither, no ``{problem}``, or a field that no data set has.
    """
    if name_or_file in BUILT_IN:
        return BUILT_IN[name_or_file]
    try:
        text = Path(name_or_file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise TempoError(
            f"--template {name_or_file}: {reason}; expected a text file or one of {', '.join(BUILT_IN)}"
        ) from None
    found = set(_FIELD.findall(text))
    if unknown := sorted(found - set(FIELDS)):
        raise TempoError(f"{name_or_file}: field {{{unknown[0]}}} is unknown; known: {_braced(FIELDS)}")
    if "problem" not in found:
        raise TempoError(f"{name_or_file}: no field {{problem}}; a template needs it")
    return text.removesuffix("\n")


def template_files(name_or_file: str | None) -> list[str]:
    """The file that ``load_template`` would read, if any."""
    return [] if name_or_file is None or name_or_file in BUILT_IN else [name_or_file]


def render(template: str, fields: dict[str, str]) -> str:
    """The template with its fields filled in; braces inside of values are left alone.

    Raises:
        TempoError: the template and the problem do not have the same fields.
    """
    named = set(_FIELD.findall(template))
    if unused := sorted(set(fields) - named):
        raise TempoError(f"--template: no field {_braced(unused)}, without which the problem cannot be understood")
    if absent := sorted(named - set(fields)):
        raise TempoError(f"--template: field {_braced(absent)} has no value here; this problem has {_braced(fields)}")
    return _FIELD.sub(lambda match: fields[match[1]], template)


def _braced(names: Iterable[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)
