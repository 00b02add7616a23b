"""What the documentation points at is there, and what it gives as a configuration is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tempo_megatron.config.load import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def links(page: Path) -> list[str]:
    """Targets of the links and pictures outside code blocks that lead to this repository."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


def test_every_page_can_be_found_from_the_readme() -> None:
    named = {(ROOT / target.partition("#")[0]).resolve() for target in links(PAGES[0])}
    assert set(PAGES[1:]) <= named


def test_the_readme_names_what_everybody_needs() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    headings = re.findall(r"(?m)^## (.+)$", text)
    assert headings == ["Status", "Install", "Demo", "Your own data", "Real configurations", "Reading order"]
    assert all(command in text for command in ("make demo", "make test"))


def test_the_licence_is_the_one_that_is_named() -> None:
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert 'license="Apache-2.0"' in (ROOT / "setup.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configurations_on_the_pages_load(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"(?ms)^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"))
    for i, block in enumerate(block for block in blocks if re.search(r"(?m)^stage:", block)):
        file = tmp_path / f"{i}.yaml"
        file.write_text(block)
        load_config(str(file))
