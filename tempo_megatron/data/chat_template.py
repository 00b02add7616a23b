"""A tokenizer's chat template: rendered with the user's variables, its faults told with file and record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError, meta

from tempo_megatron.errors import TempoError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

#: What a template's own code raises on messages that it does not expect, beside what it raises on purpose.
_TEMPLATE_FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
#: Variables that rendering itself fills in.
_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


class ChatTemplate:
    """The default chat template of a tokenizer.

    Args:
        tokenizer: with its template.
        variables: further variables of the template (``data.chat_template_kwargs``).

    Raises:
        TempoError: no template, several without a default, one that is no valid Jinja, or a variable that the template
            never reads; names the file.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
        self.file = _template_file(tokenizer)
        self._tokenizer = tokenizer
        self._variables = dict(variables)
        self._template = _default_template(tokenizer, self.file)
        known = self._readable_variables() - _OURS - set(tokenizer.special_tokens_map)
        for name in variables:
            if name not in known:
                reads = f"it reads {', '.join(sorted(known))}" if known else "it reads none of its own"
                raise TempoError(
                    f"data.chat_template_kwargs.{name}: the chat template ({self.file}) has no such variable; {reads}"
                )

    def _readable_variables(self) -> set[str]:
        # Slow to import, and there already where there is a tokenizer
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            environment = _compile_jinja_template(self._template).environment
            return meta.find_undeclared_variables(environment.parse(self._template)) - set(environment.globals)
        except TemplateSyntaxError as error:
            raise TempoError(
                f"{self.file}: the chat template is no valid Jinja: {_first_line(error)} (line {error.lineno})"
            ) from None

    def render(self, name: str, messages: Messages) -> str:
        """The text of a conversation up to where the assistant begins.

        Args:
            name: of the record, for errors.
            messages: ``[{"role": ..., "content": ...}, ...]``.

        Raises:
            TempoError: the template refuses the conversation.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                **self._variables,
            )
        except _TEMPLATE_FAULTS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise TempoError(
                f"{self.file}: the chat template cannot render prompt {name!r} (roles: {roles}): {_first_line(error)}"
            ) from None
        assert isinstance(text, str)
        return text


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[tuple[str, Messages]], variables: Mapping[str, Any]
) -> list[str]:
    """The text of each (name, messages); equal ones are rendered once.  Raises TempoError as ``ChatTemplate``."""
    template = ChatTemplate(tokenizer, variables)
    texts: dict[tuple[Any, ...], str] = {}  # many attempts at one problem share a prompt
    found = []
    for name, messages in prompts:
        key = tuple(tuple(message.items()) for message in messages)
        if key not in texts:
            texts[key] = template.render(name, messages)
        found.append(texts[key])
    return found


def _default_template(tokenizer: PreTrainedTokenizerBase, file: str) -> str:
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise TempoError(
                f"{file}: chat_template holds {', '.join(map(repr, template))}; expected one named 'default'"
            )
        template = template["default"]
    if not template:
        raise TempoError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; add chat_template.jinja to the folder"
        )
    assert isinstance(template, str)
    return template


def _template_file(tokenizer: PreTrainedTokenizerBase) -> str:
    folder = Path(tokenizer.name_or_path)
    names = ("chat_template.jinja", "tokenizer_config.json")
    found = next((folder / name for name in names if (folder / name).is_file()), folder)
    return str(found)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
