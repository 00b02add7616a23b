"""Assignments into libraries: what the helper refuses, and that nothing goes around it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tempo_megatron import patching
from tempo_megatron.errors import TempoError
from tempo_megatron.patching import kept, replace_function, replace_value, set_global

PACKAGE = Path(__file__).resolve().parent.parent / "tempo_megatron"
LIBRARIES = ("torch", "megatron", "vllm", "transformers")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that says it is one of pytest's, for a message with a real name and version."""
    module = ModuleType("pytest.inner")
    source = """
LIMIT = 3
def add(left, right=0): return left + right
def limit(): return LIMIT
class Maker:
    @staticmethod
    def name(what): return f"made {what}"
    def size(self, scale): return 10 * scale
"""
    exec(source, module.__dict__)
    monkeypatch.setattr(patching, "_replaced", {})
    return module


def test_functions_methods_and_static_methods_are_replaced(library: ModuleType) -> None:
    original = replace_function(library, "add", lambda left, right=0: original(left, right) + 100, ("left", "right"))
    assert library.add(1, 2) == 103
    size = replace_function(library.Maker, "size", lambda self, scale: size(self, scale) + 1, ("self", "scale"))
    assert library.Maker().size(2) == 21
    replace_function(library.Maker, "name", lambda what: f"ours {what}", ("what",))
    assert (library.Maker.name("x"), library.Maker().name("y")) == ("ours x", "ours y")


def test_a_patch_that_is_applied_again_wraps_the_original_once(library: ModuleType) -> None:
    def install() -> None:
        original = replace_function(library, "add", lambda *args: original(*args) + 100, ("left", "right"))

    for _ in range(3):
        install()
    assert library.add(1, 2) == 103


def test_each_disagreement_names_library_version_and_target(library: ModuleType) -> None:
    version = f"pytest {metadata.version('pytest')}: pytest.inner"
    with pytest.raises(TempoError) as error:
        replace_function(library, "plus", print, ("left", "right"))
    assert str(error.value) == (
        f"{version}.plus does not exist, and tempo-megatron replaces it: install the version that its requirements pin"
    )
    for target, parameters, told in [
        ("add", ("left",), ".add takes (left, right), not (left)"),
        ("add", None, ".add takes (left, right), not parameters that cannot be read"),
        ("LIMIT", ("x",), ".LIMIT takes parameters that cannot be read, not (x)"),
    ]:
        with pytest.raises(TempoError) as error:
            replace_function(library, target, print, parameters)
        assert str(error.value).startswith(f"{version}{told}, and")
    with pytest.raises(TempoError, match=r"pytest\.inner\.LIMIT is of type int, not bool, and"):
        replace_value(library, "LIMIT", True, bool)
    with pytest.raises(TempoError, match=r"pytest\.inner\.limits does not exist"), kept(library, "limits"):
        pass
    with pytest.raises(TempoError, match=r"pytest\.inner\.LIMITS is not read by limit, and"):
        set_global(library, "LIMITS", 5, library.limit)
    assert (library.add(1, 2), library.limit()) == (3, 3)


def test_values_and_attributes_of_objects(library: ModuleType) -> None:
    replace_value(library, "LIMIT", 4, int)
    set_global(library, "LIMIT", library.limit() + 1, library.limit)
    assert library.limit() == 5
    thing = SimpleNamespace(width=None)
    replace_value(thing, "width", 3, (int, type(None)))
    assert thing.width == 3
    with pytest.raises(TempoError, match=r"types\.SimpleNamespace\.height does not exist"):
        replace_value(thing, "height", 3, int)
    with kept(library, "LIMIT"):
        library.LIMIT = 9
    assert library.limit() == 5


# ---------------------------------------------------------------- nothing goes around it


def _assignments(path: Path) -> Iterator[str]:
    """Lines that assign to an attribute of something imported from a library, or of an alias of it."""
    tree = ast.parse(path.read_text())
    foreign: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] in LIBRARIES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            foreign |= {a.asname or a.name for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Attribute | ast.Name):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if _root(node.value) in foreign:
                foreign |= {t.id for t in targets if isinstance(t, ast.Name)}
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "-")]
        if any(isinstance(t, ast.Attribute) and _root(t) in foreign for t in targets):
            yield f"{path.relative_to(PACKAGE)}:{node.lineno}"


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def test_no_assignment_into_a_library_goes_around_the_helper() -> None:
    found = {line for path in sorted(PACKAGE.rglob("*.py")) for line in _assignments(path)}
    # the layouts' snapshots of Megatron's own globals: every name comes from the module itself
    assert {line.partition(":")[0] for line in found} == {"parallel/groups.py"}


def test_the_search_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    file = tmp_path / "x.py"
    file.write_text(
        "import torch\nimport vllm.v1.engine.core as core\nfrom transformers import AutoConfig\n"
        "cuda: object = torch.cuda\ncuda.sync = 1\ncore.f = 2\nAutoConfig.x: int = 3\nsetattr(torch, 'x', 4)\n"
        "torch.cuda.y += 1\nmine = 1\nother.x = 2\n"
    )
    assert [line.partition(":")[2] for line in _assignments(file)] == ["5", "6", "7", "9", "8"]
