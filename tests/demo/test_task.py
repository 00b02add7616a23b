from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tempo_megatron.data.encode import encode_prompts, encode_sft
from tempo_megatron.data.prompts import read_eval_answers, read_eval_prompts, read_prompts
from tempo_megatron.data.sft import read_sft
from tempo_megatron.data.tokenizer import check_tokenizer
from tempo_megatron.demo.model import write_model
from tempo_megatron.demo.task import PROMPT_CHARS, RESPONSE_CHARS, make_task, solver_attempts, write_task
from tempo_megatron.verifiers import verify
from tempo_megatron.verifiers.kinds.guess_check import DIGITS, MODULUS

ROWS = 2000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_task(tmp_path_factory.mktemp("task"), seed=3, sft_rows=ROWS)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), seed=3)


def facts_in(prompts: set[str]) -> set[tuple[str, str]]:
    return {fact for p in prompts for fact in zip(p[:2], p[3:5], strict=True)}


def test_bytes_depend_on_the_seed_alone(files: dict[str, Path], tmp_path: Path) -> None:
    again = write_task(tmp_path / "again", seed=3, sft_rows=ROWS)
    other = write_task(tmp_path / "other", seed=4, sft_rows=ROWS)
    assert sorted(files) == ["eval_dl", "eval_du", "eval_hu", "sft", "train"]
    for name, path in files.items():
        assert path.read_bytes() == again[name].read_bytes()
        assert path.read_bytes() != other[name].read_bytes()
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == sorted(p.name for p in files.values())


def test_train_file_holds_no_answer_of_an_unlabeled_row(files: dict[str, Path]) -> None:
    table = pq.read_table(files["train"])
    labeled = np.array(table["labeled"].to_pylist())
    assert labeled.tolist() == [True] * 256 + [False] * 256
    assert table["answer"].slice(256).null_count == 256
    records = read_prompts([str(files["train"])]).records
    assert all((r.answer is not None) == r.labeled for r in records)
    assert len(records) == 512


def test_sets_are_disjoint_and_split_by_facts(files: dict[str, Path]) -> None:
    train = read_prompts([str(files["train"])]).records
    d_l = {r.messages[0]["content"] for r in train if r.labeled}
    d_u = {r.messages[0]["content"] for r in train if not r.labeled}
    sets = {name: read_eval_prompts([str(files[name])]) for name in ("eval_dl", "eval_du", "eval_hu")}
    texts = {name: [r.messages[0]["content"] for r in records] for name, records in sets.items()}
    assert [r.id for r in sets["eval_dl"]] == [r.id for r in train[:128]]
    assert [(r.id, r.messages) for r in sets["eval_du"]] == [(r.id, r.messages) for r in train[256:]]
    assert len(d_l) == len(d_u) == len(set(texts["eval_hu"])) == 256
    assert d_u.isdisjoint(texts["eval_hu"])
    assert facts_in(d_l).isdisjoint(facts_in(d_u | set(texts["eval_hu"])))
    assert facts_in(set(texts["eval_hu"])) <= facts_in_half(seed=3)


def facts_in_half(seed: int) -> set[tuple[str, str]]:
    return {(DIGITS[a], DIGITS[c]) for a, c in make_task(seed).unlabeled_facts.tolist()}


def test_answers_are_accepted_and_nothing_else_is(files: dict[str, Path]) -> None:
    for answer, kind in read_eval_answers([str(files["eval_hu"])]).values():
        x, c = answer[:2], answer[-2:]
        assert verify(f"{x};{c}+", answer, kind).correct
        other = DIGITS[(DIGITS.index(x[0]) + 1) % MODULUS] + x[1]
        assert not verify(f"{other};{c}+", answer, kind).correct


def test_the_solver_errs_as_engineered() -> None:
    count = 40000
    task = make_task(0)
    prompts, responses = solver_attempts(task, 0, count)
    right = {}
    for a in range(1, MODULUS):
        for c in range(1, MODULUS):
            right[DIGITS[a], DIGITS[c]] = DIGITS[task.solution[a, c]]
            assert a * task.solution[a, c] % MODULUS == c
            assert task.favourite_wrong[a, c] not in (0, task.solution[a, c])
    verdicts = []
    guesses: dict[tuple[str, str], list[str]] = {}
    for p, r in zip(prompts, responses, strict=True):
        facts = list(zip(p[:2], p[3:5], strict=True))
        answer = "".join(right[fact] for fact in facts) + f"|{p[:-1]}"
        verdicts.append(verify(r, answer, "guess_check").details)
        for fact, guess in zip(facts, r, strict=False):
            guesses.setdefault(fact, []).append(guess)
    assert all(v["well_formed"] for v in verdicts)
    assert 0.98 < np.mean([v["honest"] for v in verdicts]) < 0.995  # 1% wishful, 1% sloppy, partly without effect
    assert len(guesses) == 144
    accuracy = np.array([np.mean([g == right[fact] for g in tried]) for fact, tried in guesses.items()])
    bad = accuracy < 0.55
    assert bad.sum() == 44  # 30% of 72, rounded, in each half
    # Right by design or by one of the uniform guesses.
    assert accuracy[bad].mean() == pytest.approx(0.30 + 0.10 / 12, abs=0.02)
    assert accuracy[~bad].mean() == pytest.approx(0.75 + 0.10 / 12, abs=0.02)
    majority_is_wrong = [max(set(tried), key=tried.count) != right[fact] for fact, tried in guesses.items()]
    assert majority_is_wrong == bad.tolist()


def test_model_folder_loads_offline(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    check_tokenizer(tokenizer, model.config.vocab_size)
    assert model.config.vocab_size == 24
    assert model.dtype == torch.float32
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 200_000
    assert not model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == 64
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()


def test_weights_depend_on_the_seed_alone(model_folder: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    again, other = write_model(tmp_path / "again", seed=3), write_model(tmp_path / "other", seed=4)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone
    weights = "model.safetensors"
    assert (model_folder / weights).read_bytes() == (again / weights).read_bytes()
    assert (model_folder / weights).read_bytes() != (other / weights).read_bytes()


def test_task_and_tokenizer_fit(files: dict[str, Path], model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    records = read_sft([str(files["sft"])])
    assert len(records) == ROWS
    prompts, responses = encode_sft(tokenizer, records, PROMPT_CHARS + RESPONSE_CHARS + 1)
    assert {len(p) for p in prompts} == {PROMPT_CHARS}
    assert {len(r) for r in responses} == {RESPONSE_CHARS + 1}
    assert tokenizer.unk_token_id not in {t for ids in prompts + responses for t in ids}
    for record, ids in zip(records[:50], responses[:50], strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=True) == record.response
    train = read_prompts([str(files["train"])]).records
    texts = tokenizer.batch_decode(encode_prompts(tokenizer, train, PROMPT_CHARS))
    assert texts == [r.messages[0]["content"] for r in train]
