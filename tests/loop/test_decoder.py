from __future__ import annotations

from types import SimpleNamespace

from transformers import AutoTokenizer

from tempo_megatron.loop.collect import decoder
from tests.loop.conftest import DemoInputs


def test_no_responses_are_no_texts(demo_inputs: DemoInputs) -> None:
    """A replica that was dealt no prompt: a top-up of one prompt on two replicas."""
    tokenizer = AutoTokenizer.from_pretrained(demo_inputs.model)
    decode = decoder(SimpleNamespace(tokenizer=tokenizer))  # type: ignore[arg-type]
    assert decode([]) == []
    assert decode([[tokenizer.convert_tokens_to_ids("3")], [tokenizer.eos_token_id], []]) == ["3", "", ""]
