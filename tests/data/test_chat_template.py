"""Templates' variables, and templates that cannot be used: one line with the file and the record."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tempo_megatron.data.encode import encode_prompts, encode_sft
from tempo_megatron.data.prompts import PromptRecord
from tempo_megatron.data.sft import SftRecord
from tempo_megatron.demo.model import make_tokenizer
from tempo_megatron.errors import TempoError

MESSAGES = "{% for m in messages %}{{ m.content }}{% endfor %}"
THINKING = MESSAGES + "{% if enable_thinking is defined and enable_thinking is false %}={% else %}+{% endif %}"
#: As several published templates have it.
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)


def saved(tmp_path: Path, template: Any, *, in_config: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer loaded from a folder with this template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path, save_jinja_files=not in_config)
    return AutoTokenizer.from_pretrained(tmp_path)


def prompt(content: str, role: str = "user") -> PromptRecord:
    return PromptRecord("set/7", "s", [{"role": role, "content": content}], None, "int", False)


def encode(tokenizer: PreTrainedTokenizerBase, record: PromptRecord, **variables: Any) -> str:
    [ids] = encode_prompts(tokenizer, [record], 100, variables)
    return str(tokenizer.decode(ids)).replace(" ", "")


def test_variables_reach_the_template(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, THINKING)
    assert encode(tokenizer, prompt("12")) == "12+"
    assert encode(tokenizer, prompt("12"), enable_thinking=True) == "12+"
    assert encode(tokenizer, prompt("12"), enable_thinking=False) == "12="
    record = SftRecord("f: row 0", prompt("12").messages, "3")
    [ids], _ = encode_sft(tokenizer, [record], 100, {"enable_thinking": False})
    assert str(tokenizer.decode(ids)).replace(" ", "") == "12="


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "add_generation_prompt", "bos_token", "range", "m"])
def test_a_variable_that_the_template_never_reads_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(TempoError) as refused:
        encode(saved(tmp_path, THINKING), prompt("1"), **{name: True})
    assert str(refused.value) == (
        f"data.chat_template_kwargs.{name}: the chat template ({tmp_path}/chat_template.jinja) has no such variable; it"
        " reads enable_thinking"
    )
    with pytest.raises(TempoError, match="no such variable; it reads none of its own"):
        encode(saved(tmp_path, MESSAGES), prompt("1"), **{name: True})


@pytest.mark.parametrize(
    "template",
    [
        "{% if style is not defined %}{% set style = 'long' %}{% endif %}{{ messages[0].content }}"
        "{% if style == 'short' %}={% endif %}",  # a default of its own, as Llama 3.1 has them
        "{% set way = style | default('long') %}{{ messages[0].content }}{% if way == 'short' %}={% endif %}",
        "{% macro end() %}{% if style == 'short' %}={% endif %}{% endmacro %}{{ messages[0].content }}{{ end() }}",
    ],
)
def test_variables_are_found_wherever_they_are_read(template: str, tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, template)
    assert (encode(tokenizer, prompt("1")), encode(tokenizer, prompt("1"), style="short")) == ("1", "1=")


def test_generation_blocks_and_loop_controls_are_templates_too(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m.content }}"
        "{% generation %}{% endgeneration %}{% endfor %}{% if style == 'short' %}={% endif %}"
    )
    assert encode(saved(tmp_path, template), prompt("1"), style="short") == "1="


FAULTS = [
    (ALTERNATING, "Conversation roles must alternate"),
    ("{{ messages[3].content }}", "list object has no element 3"),
    ("{{ messages[0].content + 1 }}", "can only concatenate str"),
    ("{{ 1 // (messages | length - 1) }}", "integer"),
    ("{{ messages[0].tool_calls | tojson }}", "not JSON serializable"),
    ("{{ messages[0]['content'].frobnicate() }}", "no attribute 'frobnicate'"),
]


@pytest.mark.parametrize(("template", "wrong"), FAULTS)
@pytest.mark.parametrize("in_config", [False, True])
def test_a_template_that_raises_names_file_and_record(
    template: str, wrong: str, in_config: bool, tmp_path: Path
) -> None:
    tokenizer = saved(tmp_path, template, in_config=in_config)
    file = tmp_path / ("tokenizer_config.json" if in_config else "chat_template.jinja")
    with pytest.raises(TempoError) as refused:
        encode(tokenizer, prompt("1", "system"))
    assert str(refused.value).startswith(f"{file}: the chat template cannot render prompt 'set/7' (roles: system): ")
    assert wrong in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.content }", "{{ messages | nosuchfilter }}", "{% x %}"]
)
def test_a_template_that_is_no_jinja_names_the_file(template: str, tmp_path: Path) -> None:
    with pytest.raises(
        TempoError,
        match=rf"^{re.escape(str(tmp_path))}/chat_template.jinja: the chat template is no valid Jinja: .*line 1",
    ):
        encode(saved(tmp_path, template), prompt("1"))


def test_several_templates_need_a_default(tmp_path: Path) -> None:
    templates = {"default": MESSAGES, "tool_use": "{{ tools }}"}
    assert encode(saved(tmp_path / "a", templates), prompt("1")) == "1"
    del templates["default"]
    with pytest.raises(TempoError, match="chat_template holds 'tool_use'; expected one named 'default'"):
        encode(saved(tmp_path / "b", {**templates}), prompt("1"))
    with pytest.raises(TempoError, match="has no chat template; add chat_template"):
        encode(saved(tmp_path / "c", None), prompt("1"))
