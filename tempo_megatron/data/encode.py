"""Text to token ids: chat template and length limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tempo_megatron.data.chat_template import Messages, render_prompts
from tempo_megatron.data.prompts import PromptRecord
from tempo_megatron.data.sft import SftRecord
from tempo_megatron.errors import TempoError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[PromptRecord],
    max_prompt_tokens: int,
    template_variables: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Prompt token ids of each record, up to where the assistant begins.

    Args:
        tokenizer: with its chat template.
        records: whose messages to encode.
        max_prompt_tokens: the longest prompt.
        template_variables: ``data.chat_template_kwargs``.

    Raises:
        TempoError: the chat template cannot be used (see ``ChatTemplate``); or a prompt is longer than
            ``max_prompt_tokens`` or has no tokens.
    """
    prompts = _encode_conversations(tokenizer, [(r.id, r.messages) for r in records], template_variables)
    for record, ids in zip(records, prompts, strict=True):
        if len(ids) > max_prompt_tokens:
            raise TempoError(
                f"prompt {record.id!r} has {len(ids)} tokens, data.max_prompt_tokens is {max_prompt_tokens}; "
                "raise the limit or leave the prompt out"
            )
        _check_not_empty(record.id, ids)
    return prompts


def encode_sft(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[SftRecord],
    max_total: int,
    template_variables: Mapping[str, Any] | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompt ids, and response ids with EOS at the end, of each record.

    The two are encoded apart, as in a rollout, where the model continues given prompt tokens.

    Raises:
        TempoError: the chat template cannot be used; or prompt and response together are longer than ``max_total``.
    """
    eos = tokenizer.eos_token_id
    prompts = _encode_conversations(tokenizer, [(r.id, r.messages) for r in records], template_variables)
    responses = [[*ids, eos] for ids in _encode_texts(tokenizer, [r.response for r in records])]
    for record, prompt, response in zip(records, prompts, responses, strict=True):
        _check_not_empty(record.id, prompt)
        if len(prompt) + len(response) > max_total:
            raise TempoError(
                f"{record.id}: prompt ({len(prompt)} tokens) and response ({len(response)} with EOS) are longer than "
                f"data.max_prompt_tokens + data.max_response_tokens = {max_total}"
            )
    return prompts, responses


def _check_not_empty(name: str, ids: list[int]) -> None:
    if not ids:
        raise TempoError(f"prompt {name!r} has no tokens; the chat template made an empty text of it")


def _encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[tuple[str, Messages]],
    template_variables: Mapping[str, Any] | None,
) -> list[list[int]]:
    if not conversations:
        return []
    return _encode_texts(tokenizer, render_prompts(tokenizer, conversations, template_variables or {}))


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # The template has written the special tokens already, and a response has none of its own.
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return []
    ids = tokenizer(distinct, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    encoded = dict(zip(distinct, ids, strict=True))
    return [list(encoded[text]) for text in texts]
