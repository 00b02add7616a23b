"""What a check found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

GIB, MIB = 1 << 30, 1 << 20

Verdict = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        check: what was looked at.
        told: what is there; a fault names file, variable or option, its value and what would be right.
        remedy: what to do about it; empty where it is ok.
    """

    check: str
    verdict: Verdict
    told: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.check}: {self.told}" + (f"; {self.remedy}" if self.remedy else "")


def ok(check: str, told: str) -> Finding:
    return Finding(check, "ok", told)


def warning(check: str, told: str, remedy: str) -> Finding:
    return Finding(check, "warning", told, remedy)


def fault(check: str, told: str, remedy: str) -> Finding:
    return Finding(check, "fault", told, remedy)


def of_verdict(findings: Sequence[Finding], verdict: Verdict) -> list[Finding]:
    return [finding for finding in findings if finding.verdict == verdict]


def size(count: float) -> str:
    """Bytes, as a person reads them."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
