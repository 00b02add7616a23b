"""The data sets that can be prepared, by name."""

from __future__ import annotations

from tempo_megatron.data.prepare import any_table, choices, dapo, maths, reasoning
from tempo_megatron.data.prepare.layouts import DataSet
from tempo_megatron.errors import TempoError

DATA_SETS: dict[str, DataSet] = {
    data_set.name: data_set
    for data_set in (
        dapo.DAPO_MATH,
        maths.AIME_2024,
        maths.AIME_2025,
        maths.AIME_2026,
        maths.BEYOND_AIME,
        maths.OLYM_MATH,
        maths.MATH_500,
        maths.GSM8K,
        reasoning.DOLCI_GENERAL,
        reasoning.BBH,
        choices.AGIEVAL,
        reasoning.ZEBRA_LOGIC,
        choices.GPQA_DIAMOND,
        any_table.VERL,
        any_table.TABLE,
    )
}


def data_set(name: str) -> DataSet:
    """Raises TempoError for an unknown name."""
    try:
        return DATA_SETS[name]
    except KeyError:
        raise TempoError(f"data set {name!r} is unknown; known: {', '.join(DATA_SETS)}") from None
