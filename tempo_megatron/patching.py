"""The one way in which this package assigns into torch, Megatron-Core, vLLM and transformers.

A patch whose target a newer library has renamed would change nothing, in silence: the assignment makes a name that
nobody reads.  Here the target must exist and look as it did when the patch was written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from types import BuiltinFunctionType, ModuleType
from typing import Any

from tempo_megatron.errors import TempoError

#: (id of the owner, name) -> (owner, original, replacement): a patch that is applied again finds what it replaced.
_replaced: dict[tuple[int, str], tuple[Any, Any, Any]] = {}


def replace_function(
    owner: Any,
    name: str,
    replacement: Callable[..., Any],
    parameters: tuple[str, ...] | None,
    *,
    package: str | None = None,
) -> Callable[..., Any]:
    """Put ``replacement`` in the place of a function or method of a library, and return the original.

    Args:
        owner: the module or class.
        replacement: a function, or a staticmethod where the original is one.
        parameters: names of the original's parameters, ``self`` included; None where it is written in C and has no
            signature that Python can read.
        package: the library that the function is of, where that is not the owner's.

    Raises:
        TempoError: the name is absent, or the parameters are others.
    """
    original = _present(owner, name, package)
    _, before, ours = _replaced.get((id(owner), name), (None, None, None))
    if ours is not None and original is ours:
        original = before
    found = _parameters(original)
    if found != parameters:
        raise _mismatch(owner, name, f"takes {_listed(found)}, not {_listed(parameters)}", package)
    if isinstance(inspect.getattr_static(owner, name), staticmethod) and not isinstance(replacement, staticmethod):
        replacement = staticmethod(replacement)
    setattr(owner, name, replacement)
    _replaced[id(owner), name] = owner, original, getattr(owner, name)
    return original


def unless_native(owner: Any, name: str, parameters: tuple[str, ...]) -> tuple[str, ...] | None:
    """``parameters`` for ``replace_function`` of what Transformer Engine, where installed, has as a kernel in C."""
    return None if isinstance(getattr(owner, name, None), BuiltinFunctionType) else parameters


def replace_value(
    owner: Any, name: str, value: Any, kind: type | tuple[type, ...], *, package: str | None = None
) -> None:
    """Give a constant, a class or an object's attribute another value.

    Args:
        owner: a module, or an object that a library made.
        kind: what the attribute is an instance of before.
        package: the library that set the attribute, where that is not the one of the owner's class.

    Raises:
        TempoError: the name is absent, or what it holds is of another kind.
    """
    found = _present(owner, name, package)
    if not isinstance(found, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise _mismatch(owner, name, f"is of type {type(found).__name__}, not {wanted}", package)
    setattr(owner, name, value)


def set_global(module: ModuleType, name: str, value: Any, reader: Callable[..., Any]) -> None:
    """Set a global that ``reader``, a function of the module, looks up, though the module may not define it.

    Raises:
        TempoError: ``reader`` does not mention the name.
    """
    if name not in reader.__code__.co_names:
        raise _mismatch(module, name, f"is not read by {reader.__qualname__}")
    setattr(module, name, value)


@contextmanager
def kept(owner: Any, name: str) -> Iterator[None]:
    """What a library assigns to ``name`` within the block is undone after it.  TempoError if the name is absent."""
    value = _present(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, value)


def _present(owner: Any, name: str, package: str | None = None) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise _mismatch(owner, name, "does not exist", package) from None


def _parameters(function: Any) -> tuple[str, ...] | None:
    schema = getattr(getattr(function, "default", None), "_schema", None)
    if schema is not None:  # an operator of torch.ops: its Python signature is (*args, **kwargs)
        return tuple(argument.name for argument in schema.arguments)
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None


def _listed(parameters: tuple[str, ...] | None) -> str:
    return "parameters that cannot be read" if parameters is None else f"({', '.join(parameters)})"


def _mismatch(owner: Any, name: str, problem: str, package: str | None = None) -> TempoError:
    if isinstance(owner, ModuleType):
        where = owner.__name__
    else:
        kind = owner if isinstance(owner, type) else type(owner)
        where = f"{kind.__module__}.{kind.__qualname__}"
    library = _library(package or where.partition(".")[0])
    return TempoError(
        f"{library}: {where}.{name} {problem}, and tempo-megatron replaces it: install the version that its "
        "requirements pin"
    )


def _library(package: str) -> str:
    """Name and version of the installed distribution with this top-level package."""
    names = metadata.packages_distributions().get(package, [])
    return f"{names[0]} {metadata.version(names[0])}" if names else package
