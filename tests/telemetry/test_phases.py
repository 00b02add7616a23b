from __future__ import annotations

import time
from pathlib import Path

import pytest

from tempo_megatron.telemetry.phases import PhaseLedger, _HostPeak

MIB = 1 << 20
ALLOCATION = 200 * MIB


def test_phases_add_up_and_collect_starts_afresh() -> None:
    ledger = PhaseLedger()
    for _ in range(2):
        with ledger.phase("rollout"):
            time.sleep(0.02)
    with ledger.phase("estep"):
        time.sleep(0.01)
    record = ledger.collect()
    assert set(record) == {"time/rollout_s", "time/estep_s", "time/step_s", "memory/rollout_gib", "memory/estep_gib"}
    assert record["time/rollout_s"] >= 0.04
    assert record["time/estep_s"] >= 0.01
    assert record["time/step_s"] >= record["time/rollout_s"] + record["time/estep_s"]
    assert set(ledger.collect()) == {"time/step_s"}


def test_an_inner_phase_stops_the_outer_clock() -> None:
    ledger = PhaseLedger()
    with ledger.phase("outer"), ledger.phase("inner"):
        time.sleep(0.05)
    record = ledger.collect()
    assert record["time/inner_s"] >= 0.05
    assert record["time/outer_s"] + record["time/inner_s"] <= record["time/step_s"]
    assert record["time/outer_s"] < 0.05


def test_current_and_hook_follow_the_innermost_phase() -> None:
    seen: list[str] = []
    ledger = PhaseLedger(on_phase=seen.append)
    assert ledger.current is None
    with ledger.phase("outer"):
        with ledger.phase("inner"):
            assert ledger.current == "inner"
        assert ledger.current == "outer"
    assert ledger.current is None
    assert seen == ["outer", "inner", "outer"]


def test_an_exception_closes_its_phase() -> None:
    ledger = PhaseLedger()
    with pytest.raises(KeyboardInterrupt), ledger.phase("rollout"):
        raise KeyboardInterrupt
    assert ledger.current is None
    assert "time/rollout_s" in ledger.collect()


def test_throughput_is_tokens_over_the_phase_seconds() -> None:
    ledger = PhaseLedger()
    with ledger.phase("rollout"):
        time.sleep(0.02)
    ledger.add_tokens("rollout", 300)
    ledger.add_tokens("rollout", 700)
    ledger.add_tokens("never ran", 5)
    record = ledger.collect()
    assert record["throughput/rollout_tokens_per_s"] == pytest.approx(1000 / record["time/rollout_s"])
    assert "throughput/never ran_tokens_per_s" not in record


def test_collect_inside_a_phase_splits_it() -> None:
    ledger = PhaseLedger()
    with ledger.phase("rollout"):
        time.sleep(0.02)
        first = ledger.collect()
        time.sleep(0.01)
    second = ledger.collect()
    assert first["time/rollout_s"] >= 0.02
    assert 0.01 <= second["time/rollout_s"] <= second["time/step_s"]


def _high_water_mark_can_be_reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _high_water_mark_can_be_reset(), reason="/proc/self/clear_refs is not writable here")
def test_peak_memory_sees_an_allocation_in_its_phase_only() -> None:
    ledger = PhaseLedger()
    with ledger.phase("before"):
        pass
    with ledger.phase("big"):
        block = bytearray(ALLOCATION)  # bytes of zero are written, so the pages are resident
        block[::4096] = b"1" * len(block[::4096])
        del block
    with ledger.phase("after"):
        pass
    record = ledger.collect()
    growth_mib = (record["memory/big_gib"] - record["memory/before_gib"]) * 1024
    assert 190 <= growth_mib <= 260
    assert record["memory/after_gib"] < record["memory/big_gib"] - 150 / 1024
    with ledger.phase("later"):
        pass
    ledger.collect()
    assert ledger.peak_gib == record["memory/big_gib"]


class TwoParts:
    """Says what it was told: ``big`` is needed in phase ``work`` and ``inner``, ``other`` in ``outer``."""

    def __init__(self) -> None:
        self.needs = {"work": "big", "inner": "big", "outer": "other"}
        self.here, self.entered = "other", list[str]()

    def has_to_move(self, phase: str) -> bool:
        return self.needs.get(phase, self.here) != self.here

    def enter(self, phase: str) -> None:
        time.sleep(0.02)
        self.entered.append(phase)
        self.here = self.needs[phase]

    def resident_bytes(self) -> dict[str, int]:
        return {self.here: MIB}


def test_what_a_phase_needs_comes_before_it_and_is_booked_apart() -> None:
    seen: list[str] = []
    ledger, parts = PhaseLedger(on_phase=seen.append), TwoParts()
    ledger.residency = parts
    with ledger.phase("unknown"):
        pass
    with ledger.phase("work"), ledger.phase("work"):
        pass
    record = ledger.collect()
    assert parts.entered == ["work"] and seen[:3] == ["unknown", "move for work", "work"]
    assert record["time/move_s"] >= 0.02 > record["time/work_s"]
    with ledger.phase("outer"), ledger.phase("inner"):
        assert parts.here == "big"
    assert parts.entered == ["work", "outer", "inner", "outer"], "the outer phase goes on with what it needs"
    by_phase = ledger.memory_by_phase()
    assert by_phase["work"].keys() == by_phase["inner"].keys() == {"peak", "big"}
    assert by_phase["outer"]["other"] == pytest.approx(1 / 1024, abs=1e-3)


def test_nothing_moves_for_a_phase_that_goes_on_with_an_error() -> None:
    ledger, parts = PhaseLedger(), TwoParts()
    ledger.residency = parts
    with pytest.raises(RuntimeError, match="lost"), ledger.phase("outer"), ledger.phase("inner"):
        raise RuntimeError("lost")
    assert parts.entered == ["inner"]


def test_without_reset_the_mark_since_the_start_is_used(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t 1024 kB\n")
    peak = _HostPeak(proc=tmp_path / "denied")  # no such folder: neither reset nor status
    peak.reset()
    assert peak.peak_bytes() > MIB  # getrusage
    (tmp_path / "clear_refs").mkdir()  # cannot be written
    peak = _HostPeak(proc=tmp_path)
    peak.reset()
    assert peak.peak_bytes() == 2048 * 1024
