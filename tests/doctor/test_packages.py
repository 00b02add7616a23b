"""Packages as pip leaves them: folders with their metadata, which nothing imports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tempo_megatron.doctor.finding import Finding
from tempo_megatron.doctor.packages import check_packages, installed

REQUIRES = ["numpy==2.3.5", 'torch==2.13.0+cpu; extra == "cpu"', 'torch==2.11.0; extra == "cuda"']
REQUIRES += ['transformer-engine[pytorch]==2.11.0; extra == "cuda"', 'pytest==9; extra == "dev"']


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., list[Finding]]:
    """What is found where only the given packages are installed: name-version -> its files."""

    def _check(**packages: list[str] | None) -> list[Finding]:
        for key, files in packages.items():
            name, version = key.split("__")
            version = version.replace("_cpu", "+cpu").replace("_", ".")
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            for file in files or []:  # from Python 3.12 on files that are not there do not count
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).touch()
            (folder / "RECORD").write_text("".join(f"{file},,\n" for file in files or []))
        return check_packages(installed([str(tmp_path)]), REQUIRES)

    return _check


def bad(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.check, finding.verdict) for finding in findings if finding.verdict != "ok"]


def test_this_environment_is_as_pinned() -> None:
    (found,) = check_packages(installed())
    assert found.verdict == "ok"
    assert "torch" in found.told


def test_pins_of_the_stack_that_is_installed(check: Callable[..., list[Finding]]) -> None:
    found = check(torch__2_13_0_cpu=None, numpy__2_3_5=None)
    assert bad(found) == []
    assert found[0].told == "as pinned for cpu: torch 2.13.0+cpu, and 1 more"


def test_other_versions_and_absent_packages(check: Callable[..., list[Finding]]) -> None:
    found = check(torch__2_12_0=None, numpy__2_2_0=None)
    assert bad(found) == [("packages", "fault"), ("packages", "warning"), ("packages", "fault")]
    assert found[0].told == "not installed: transformer-engine[pytorch]==2.11.0"
    assert found[0].remedy == "make cuda-env"
    assert found[2].told == "torch 2.12.0, tested with ==2.11.0"


def test_the_package_indexs_apex_is_not_nvidias(check: Callable[..., list[Finding]], tmp_path: Path) -> None:
    good = {"torch__2_13_0_cpu": None, "numpy__2_3_5": None}
    found = check(**good, apex__0_9_10=["apex/__init__.py", "apex/velruse.py"])
    assert bad(found) == [("apex", "fault")]
    assert found[-1].told.startswith(f"0.9.10 in {tmp_path} is the package index's")
    assert found[-1].remedy.startswith("pip uninstall apex")


def test_nvidias_apex_is_taken(check: Callable[..., list[Finding]]) -> None:
    files = ["apex/__init__.py", "apex/normalization/fused_layer_norm.py"]
    assert bad(check(torch__2_13_0_cpu=None, numpy__2_3_5=None, apex__0_1=files)) == []


def test_cuda_builds_beside_torch_for_the_cpu(check: Callable[..., list[Finding]]) -> None:
    good = {"torch__2_13_0_cpu": None, "numpy__2_3_5": None}
    found = check(**good, torchvision__0_28_0=None, torchaudio__2_13_0_cpu=None, torchcodec__0_9=None)
    assert bad(found) == [("builds for torch", "fault")]
    assert found[-1].told.startswith("torchvision 0.28.0, torchcodec 0.9: built for CUDA, beside torch 2.13.0+cpu")
    assert found[-1].remedy == "pip uninstall torchvision torchcodec"


def test_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    (found,) = check_packages(installed([str(tmp_path)]))
    assert (found.verdict, "is not installed" in found.told) == ("warning", True)
