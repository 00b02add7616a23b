from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Qwen3Config

from tempo_megatron.loop.sft import SFTLoop


@pytest.mark.parametrize(("head_dim", "told"), [(64, ""), (16, "refuse this model: models/x/config.json: head_dim 16")])
def test_a_model_that_no_later_stage_takes_is_told_at_the_cold_start(head_dim: int, told: str) -> None:
    notes: list[str] = []
    config = Qwen3Config(hidden_size=64, num_attention_heads=2, head_dim=head_dim)
    session = SimpleNamespace(hf_dir=Path("models/x"), hf_config=config, progress=SimpleNamespace(note=notes.append))
    SFTLoop._warn_of_later_stages(SimpleNamespace(session=session))  # type: ignore[arg-type]
    assert (told in notes[0]) if told else notes == []
