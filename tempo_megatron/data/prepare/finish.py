"""The second pass over a data set, when all its answers are known: kinds, prompts, answers that accept themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tempo_megatron.data.answer_kinds import PromptRow, decide_kinds
from tempo_megatron.data.golds import BOX, asked_forms, form_problem, gold_problem
from tempo_megatron.data.prepare.records import PreparedRecord, Summary
from tempo_megatron.data.prepare.tables import BadRow
from tempo_megatron.data.prepare.templates import BUILT_IN, OF_KIND, render

_SEVERAL_LETTERS = "choices-listed"
_NO_INSTRUCTION = "plain"  # where the problem has one in words that say more than ours


@dataclass(frozen=True, slots=True)
class Draft:
    """A record before its kind and its prompt are known.

    Attributes:
        row: the record; its messages are still to be made.
        fields: of the template; ``problem`` is without the publisher's instructions.
        template: name of a built-in one; None: the one that suits the kind.
        published: the problem with the publisher's instructions.
    """

    row: PromptRow
    fields: dict[str, str]
    template: str | None
    published: str

    @property
    def problem(self) -> str:
        """The problem and its options, without a template: what copies have in common."""
        options = self.fields.get("options")
        return f"{self.fields['problem']}\n\n{options}" if options else self.fields["problem"]


def decided(drafts: Sequence[Draft], answer_type: str | None, summary: Summary) -> list[Draft]:
    """The drafts with a kind and a template each, which suit all answers of their source.

    Args:
        drafts: of all files.
        answer_type: kind of those that have none yet; None: by their answers.
        summary: is told what was decided.

    Raises:
        TempoError: ``answer_type`` is no kind.
    """
    sources = {draft.row.source for draft in drafts}
    settings = {} if answer_type is None else dict.fromkeys(sources, answer_type)
    summary.notes += map(str, decide_kinds([draft.row for draft in drafts], settings))
    several = {draft.row.source for draft in drafts if draft.row.kind == "choice" and _letters(draft.row.answer) > 1}
    found = [replace(draft, template=_template_name(draft, draft.row.source in several)) for draft in drafts]
    if stripped := sum(draft.fields["problem"] != draft.published for draft in drafts):
        summary.notes.append(f"the publisher's instructions were taken off {stripped} problems")
    if own := sum(draft.template == _NO_INSTRUCTION and _asks_for_box(draft) for draft in found):
        summary.notes.append(f"{own} problems ask for a box in words of their own: no instruction was added to them")
    return found


def finished(draft: Draft, template: str | None) -> PreparedRecord:
    """The record with its prompt.

    Args:
        draft: with its kind and the name of its template.
        template: text of the user's choice, instead of that.

    Raises:
        BadRow: the prompt asks for a form of answer that the kind does not read, or the answer does not accept itself.
        TempoError: template and problem do not have the same fields.
    """
    row, kind = draft.row, draft.row.kind
    assert kind is not None and draft.template is not None  # decided by now
    prompt = render(template or BUILT_IN[draft.template], draft.fields)
    messages = [{"role": "user", "content": prompt}]
    if problem := form_problem(messages, kind):
        raise BadRow("asks for another form of answer", problem)
    if row.answer is not None and (problem := gold_problem(messages, row.answer, kind)):
        raise BadRow("answer cannot be checked", problem)
    return PreparedRecord(row.id, row.source, prompt, draft.problem, row.answer, kind, row.place)


def _template_name(draft: Draft, has_several_letters: bool) -> str:
    name = draft.template or OF_KIND.get(draft.row.kind or "", _NO_INSTRUCTION)
    if name in OF_KIND.values() and _asks_for_box(draft):
        return _NO_INSTRUCTION
    return _SEVERAL_LETTERS if has_several_letters and draft.template is None else name


def _asks_for_box(draft: Draft) -> bool:
    return BOX in asked_forms([{"role": "user", "content": draft.fields["problem"]}])


def _letters(answer: str | None) -> int:
    return sum(map(str.isalpha, answer or ""))
