from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tempo_megatron.data.encode import encode_prompts, encode_sft
from tempo_megatron.data.prompts import PromptRecord
from tempo_megatron.data.sft import SftRecord
from tempo_megatron.data.tokenizer import check_tokenizer
from tempo_megatron.demo.model import make_tokenizer
from tempo_megatron.errors import TempoError

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] | replace('u', '=') | replace('s', '+') }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def prompt(name: str, *contents: str) -> PromptRecord:
    messages = [{"role": "user", "content": content} for content in contents]
    return PromptRecord(name, "s", messages, None, "int", False)


def ids(text: str) -> list[int]:
    vocabulary = make_tokenizer().get_vocab()
    return [vocabulary[character] for character in text]


def test_prompts_go_through_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": "23"}]
    assert encode_prompts(tokenizer, [PromptRecord("s", "s", messages, None, "int", False)], 6) == [ids("+1=23:")]
    records = [prompt("a", "12"), prompt("b", "3", "4"), prompt("c", "12")]
    assert encode_prompts(tokenizer, records, 5) == [ids("=12:"), ids("=3=4:"), ids("=12:")]
    assert encode_prompts(tokenizer, [], 5) == []


def test_equal_prompts_share_no_list(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = encode_prompts(tokenizer, [prompt("a", "12"), prompt("b", "12")], 5)
    first.append(0)
    assert second == ids("=12:")


def test_long_prompt_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TempoError, match=r"prompt 'b' has 6 tokens, data\.max_prompt_tokens is 5"):
        encode_prompts(tokenizer, [prompt("a", "12"), prompt("b", "1234")], 5)


def test_empty_prompt_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(TempoError, match="prompt 'a' has no tokens"):
        encode_prompts(tokenizer, [prompt("a", "12")], 5)


def test_no_template_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(TempoError, match="no chat template"):
        encode_prompts(tokenizer, [prompt("a", "1")], 9)


def test_sft_ends_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [
        SftRecord("f: row 0", prompt("", "12").messages, "34"),
        SftRecord("f: row 1", prompt("", "5").messages, "6"),
    ]
    prompts, responses = encode_sft(tokenizer, records, 7)
    assert prompts == [ids("=12:"), ids("=5:")]
    assert responses == [[*ids("34"), tokenizer.eos_token_id], [*ids("6"), tokenizer.eos_token_id]]
    with pytest.raises(TempoError, match=r"f: row 0: prompt \(4 tokens\) and response \(3 with EOS\) .* = 6"):
        encode_sft(tokenizer, records, 6)


def test_special_tokens_are_not_added_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers.processors import TemplateProcessing

    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", eos)])
    assert tokenizer("1")["input_ids"] == [eos, *ids("1")]
    assert encode_prompts(tokenizer, [prompt("a", "1")], 9) == [ids("=1:")]


def test_check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    check_tokenizer(tokenizer, 24)
    check_tokenizer(tokenizer, len(tokenizer))
    with pytest.raises(TempoError, match=r"largest token id is 20 .*, the model's vocab_size is 20"):
        check_tokenizer(tokenizer, len(tokenizer) - 1)
    tokenizer.eos_token = None
    with pytest.raises(TempoError, match="no eos_token"):
        check_tokenizer(tokenizer, 24)
