"""Files of verl's layout, and tables of a problem and an answer, whatever they hold: the kind comes from the column.

verl             data_source, prompt (messages or text), reward_model {ground_truth, is_labeled}, extra_info {index};
                 so are the files of TTRL's ``preprocess.py`` and open-r1/DAPO-Math-17k-Processed
table            PRIME-RL/TTRL's ``train.json`` and ``test.json`` (prompt, answer, source, id);
                 open-r1/OpenR1-Math-220k (problem, answer, uuid, source);
                 open-r1/Big-Math-RL-Verified-Processed (prompt, solution); question and answer

Records are grouped by the file's own ``data_source`` or ``source`` unless ``--source`` names another.
"""

from __future__ import annotations

from typing import Any

from tempo_megatron.data.prepare.instructions import bare_problem
from tempo_megatron.data.prepare.layouts import DataSet, Layout, Problem, Settings
from tempo_megatron.data.prepare.tables import BadRow, Row
from tempo_megatron.verifiers.verdict import MAX_ANSWER_CHARS


def prompt_text(row: Row) -> str:
    """The problem of a column ``prompt``: text, or the user's one message and what the system says beside instructions.

    Raises:
        TempoError: another type.
        BadRow: no text, or a conversation of several turns.
    """
    if isinstance(row.values["prompt"], str):
        return row.text("prompt")
    messages = [] if row.values["prompt"] == [] else row.filled("prompt")
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "content" in m for m in messages):
        raise row.wrong_type("prompt", "string or list of {role, content}")
    system = [m["content"] for m in messages if m.get("role") == "system"]
    turns = [m["content"] for m in messages if m.get("role") != "system"]
    if len(turns) != 1 or not all(isinstance(text, str) for text in (*system, *turns)):
        raise BadRow("not one user message", f"column 'prompt' has {len(turns)} messages, expected one with text")
    said = [text for text in map(bare_problem, system) if text]
    return "\n\n".join([*said, turns[0].strip()])


def extra_index(row: Row) -> str | None:
    """``extra_info.index``, if any."""
    info: Any = row.values.get("extra_info")
    index = info.get("index") if isinstance(info, dict) else None
    return str(index) if isinstance(index, str | int) and str(index) else None


def ground_truth(row: Row) -> str:
    """``reward_model.ground_truth`` as text.

    Raises:
        TempoError: another type.
        BadRow: none or several, or the row is not labelled.
    """
    reward = row.filled("reward_model")
    if not isinstance(reward, dict) or "ground_truth" not in reward:
        raise row.wrong_type("reward_model", "struct with a field 'ground_truth'")
    if reward.get("is_labeled") is False:
        raise BadRow("not labelled", "reward_model.is_labeled is false: the answer must not be used")
    truth = reward["ground_truth"]
    if isinstance(truth, list) and len(truth) == 1:
        truth = truth[0]
    if truth is None or truth == "" or truth == []:
        raise BadRow("empty answer", "reward_model.ground_truth is empty")
    if isinstance(truth, list):
        raise BadRow("several answers", f"reward_model.ground_truth has {len(truth)} answers, expected one")
    return Row(row.file, row.number, {"reward_model.ground_truth": truth}).any_number_or_text(
        "reward_model.ground_truth"
    )


def _verl_problem(row: Row, settings: Settings) -> Problem:
    return Problem({"problem": prompt_text(row)}, None, None, extra_index(row), _source(row, "data_source"))


def _verl_answer(row: Row, settings: Settings) -> str:
    return _bounded(ground_truth(row))


def _source(row: Row, column: str) -> str | None:
    return None if row.is_empty(column) else row.number_or_text(column)


def _bounded(answer: str) -> str:
    if len(answer) > MAX_ANSWER_CHARS:
        found = f"answer {answer[:40]!r}... has {len(answer)} characters, at most {MAX_ANSWER_CHARS} can be checked"
        raise BadRow("answer too long", found)
    return answer


def _table(published_by: str, problem: str, answer: str, key: str | None = None) -> Layout:
    def read_problem(row: Row, settings: Settings) -> Problem:
        text = prompt_text(row) if problem == "prompt" else row.text(problem)
        identity = row.number_or_text(key) if key is not None and not row.is_empty(key) else None
        return Problem({"problem": text}, None, None, identity, _source(row, "source"))

    def read_answer(row: Row, settings: Settings) -> str:
        return _bounded(row.any_number_or_text(answer))

    optional = ("source",) if key is None else ("source", key)
    return Layout(published_by, (problem,), (answer,), read_problem, read_answer, optional)


VERL = DataSet(
    "verl",
    "any file of verl's layout; the kind of answer is that of the whole column, or --answer-type",
    (
        Layout(
            "verl, TTRL's preprocess.py or open-r1/DAPO-Math-17k-Processed (prompt, reward_model, data_source)",
            ("prompt",),
            ("reward_model",),
            _verl_problem,
            _verl_answer,
            ("extra_info", "data_source"),
        ),
    ),
    (),
)

TABLE = DataSet(
    "table",
    "any table of problems and answers; the kind of answer is that of the whole column, or --answer-type",
    (
        _table("PRIME-RL/TTRL's JSON (prompt, answer, source, id)", "prompt", "answer", "id"),
        _table("open-r1/OpenR1-Math-220k (problem, answer, source, uuid)", "problem", "answer", "uuid"),
        _table("open-r1/Big-Math-RL-Verified-Processed (prompt, solution, source)", "prompt", "solution"),
        _table("a table of questions (question, answer)", "question", "answer", "id"),
    ),
    (),
)
