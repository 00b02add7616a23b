"""Packaging.  Every pin lives in requirements/*.txt and is read from there."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def pins(name: str) -> list[str]:
    """The requirements of requirements/NAME.txt, comments left out."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in (line.split("#")[0].strip() for line in text.splitlines()) if line]


def version() -> str:
    text = (ROOT / "tempo_megatron" / "__init__.py").read_text(encoding="utf-8")
    return re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0]


setup(
    name="tempo-megatron",
    version=version(),
    description="TEMPO (test-time training by Expectation-Maximisation) on Megatron-Core and vLLM",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["tempo_megatron", "tempo_megatron.*"]),
    package_data={"tempo_megatron": ["**/*.html", "**/*.j2", "**/*.sh"]},
    install_requires=pins("core"),
    extras_require={name: pins(name) for name in ("cpu", "cuda", "dev", "gguf", "reasoning-gym", "wandb")},
    entry_points={"console_scripts": ["tempo-megatron = tempo_megatron.cli:main"]},
)
