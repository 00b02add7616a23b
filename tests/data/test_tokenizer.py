"""The tokenizer is the folder's own file, whatever class the folder names; what is not right is told in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerBase

from tempo_megatron.data.tokenizer import (
    PROBES,
    check_token_ids,
    check_tokenizer,
    load_tokenizer,
    response_decoder,
    stop_token_ids,
)
from tempo_megatron.errors import TempoError
from tempo_megatron.verifiers.reasoning import is_tag
from tests.data.tokenizer_files import KINDS, SPECIAL, stored, write_tokenizer

CLASSES = (
    "LlamaTokenizerFast",
    "LlamaTokenizer",
    "Qwen2Tokenizer",
    "GPT2Tokenizer",
    "TokenizersBackend",
    "absent",
)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def refusal(folder: Path, vocab_size: int = 1000) -> str:
    with pytest.raises(TempoError) as caught:
        load_tokenizer(folder, vocab_size)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{folder}/", "")


# ---------------------------------------------------------------- tokenizer.json is the tokenizer


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("named", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_json_is_loaded_as_it_is(tmp_path: Path, kind: str, named: str, model_type: str) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, kind, model_type, tokenizer_class=named), 1000)
    own = Tokenizer.from_str(stored(kind))
    for text in (*PROBES, "<|im_start|>user\nSum 1 + 2<|im_end|>\n"):
        assert ids_of(tokenizer, text) == own.encode(text, add_special_tokens=False).ids
    for text in PROBES:
        assert tokenizer.decode(ids_of(tokenizer, text)) == text
    assert tokenizer.get_vocab() == own.get_vocab()


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_encoded_as_the_file_says(byte_level: tuple[PreTrainedTokenizerBase, Tokenizer], text: str) -> None:
    tokenizer, own = byte_level
    ids = ids_of(tokenizer, text)
    assert ids == own.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedTokenizerBase, Tokenizer]:
    """A byte-level tokenizer in a folder that names Llama's class, as DeepSeek's are."""
    folder = write_tokenizer(tmp_path_factory.mktemp("r1"), tokenizer_class="LlamaTokenizerFast")
    return load_tokenizer(folder, 1000), Tokenizer.from_str(stored("qwen"))


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokenizer_class="My", auto_map={"AutoTokenizer": ["my.My", None]})
    (tmp_path / "my.py").write_text("raise SystemExit('ran')\n")
    assert load_tokenizer(tmp_path, 1000).decode(ids_of(load_tokenizer(tmp_path, 1000), "a b\n")) == "a b\n"


def test_truncation_and_padding_in_the_file_do_nothing(tmp_path: Path) -> None:
    """``save_pretrained`` after a training run keeps them in the file."""
    write_tokenizer(tmp_path)
    own = Tokenizer.from_str(stored("qwen"))
    own.enable_truncation(3)
    own.enable_padding(length=64, pad_token="<|endoftext|>")
    own.save(str(tmp_path / "tokenizer.json"))
    text = "What is 12 + 7 ? The answer is 19 ."
    tokenizer = load_tokenizer(tmp_path, 1000)
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


@pytest.mark.parametrize("clean", [True, False])
def test_decoding_keeps_spaces_before_punctuation(tmp_path: Path, clean: bool) -> None:
    folder = write_tokenizer(tmp_path, clean_up_tokenization_spaces=clean)
    folder_changes = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": clean}
    tokenizer = load_tokenizer(write_tokenizer(folder, clean_up_tokenization_spaces=clean, **folder_changes), 1000)
    assert tokenizer.batch_decode([ids_of(tokenizer, "f(x) , do n't .")]) == ["f(x) , do n't ."]


@pytest.mark.parametrize("kind", KINDS)
def test_responses_keep_tags_of_reasoning(tmp_path: Path, kind: str) -> None:
    own = Tokenizer.from_str(stored(kind))
    own.add_special_tokens(["<think>", "</think>"])
    own.save(str(write_tokenizer(tmp_path, kind) / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, 1000)
    decode = response_decoder(tokenizer, keep=is_tag)
    ids = own.encode("<think>is it 1 ?</think>\n2<|im_end|>", add_special_tokens=False).ids
    assert decode([ids]) == [tokenizer.decode(ids[:-1])]
    assert "</think>" in decode([ids])[0]
    assert (
        tokenizer.decode(ids, skip_special_tokens=True)
        == response_decoder(tokenizer, keep=lambda token: False)([ids])[0]
    )
    assert decode([]) == []  # a replica that was dealt no prompts
    assert decode([[], [tokenizer.eos_token_id]]) == ["", ""]


# ---------------------------------------------------------------- what lies beside it


def test_templates_lie_in_the_config_or_in_files(tmp_path: Path) -> None:
    def rendered() -> str:
        return str(
            load_tokenizer(tmp_path, 1000).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        )

    write_tokenizer(tmp_path)
    assert rendered() == "<|im_start|>x"
    write_tokenizer(tmp_path, chat_template=[{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}])
    assert rendered() == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert rendered() == "file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("tool")
    assert rendered() == "file"
    assert load_tokenizer(tmp_path, 1000).get_chat_template("tool") == "tool"


def test_special_tokens_of_an_older_folder(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, eos_token="absent", bos_token="absent")
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|endoftext|>", "lstrip": False, "normalized": True}})
    )
    tokenizer = load_tokenizer(tmp_path, 1000)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.decode(ids_of(tokenizer, "a <|endoftext|> b")) == "a <|endoftext|> b"


def test_a_token_with_its_id_in_the_config_is_taken(tmp_path: Path) -> None:
    at = Tokenizer.from_str(stored("qwen")).get_vocab_size()
    new = {
        "content": "<new>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    write_tokenizer(tmp_path, eos_token="<new>", added_tokens_decoder={str(at): new})
    assert load_tokenizer(tmp_path, 1000).eos_token_id == at


@pytest.mark.parametrize("key", ["eos_token", "bos_token", "pad_token", "unk_token", "extra_special_tokens"])
def test_a_special_token_that_the_file_lacks(tmp_path: Path, key: str) -> None:
    """transformers gives it an id of its own: one that the model never saw, or that it has no embedding for."""
    write_tokenizer(tmp_path, **{key: ["[NEW]"] if key == "extra_special_tokens" else "[NEW]"})
    assert refusal(tmp_path) == f"tokenizer_config.json: {key} '[NEW]' is not a token of tokenizer.json"


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7031645\n")


def resaved_by_llama(path: Path) -> None:
    """What transformers 5 leaves of a byte-level tokenizer after loading and saving it by the class of its folder."""
    LlamaTokenizer.from_pretrained(path.parent).save_pretrained(path.parent)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lfs_pointer, "tokenizer.json: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"),
        (lambda path: path.write_text(stored("qwen")[:2000]), "tokenizer.json: not a tokenizer that can be read (EOF"),
        (lambda path: path.write_text("[]"), "tokenizer.json: not a tokenizer that can be read ("),
        (lambda path: path.write_bytes(b"\xff\xfe"), "tokenizer.json: not a tokenizer that can be read ("),
        (resaved_by_llama, "tokenizer.json: loses text: 'What is 12 + 7?' comes back as 'Whatis12+7?'; its pre-tok"),
    ],
)
def test_a_damaged_tokenizer_json(tmp_path: Path, damage: Callable[[Path], Any], told: str) -> None:
    damage(write_tokenizer(tmp_path) / "tokenizer.json")
    assert refusal(tmp_path).startswith(told)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"eos_token": "absent"}, "the tokenizer has no eos_token; set it in tokenizer_config.json"),
        ({"eos_token": None}, "the tokenizer has no eos_token; set it in tokenizer_config.json"),
        ({"eos_token": 2}, "tokenizer_config.json: eos_token: 2 must be a token (a string)"),
        ({"pad_token": {"text": "x"}}, "tokenizer_config.json: pad_token: {'text': 'x'} must be a token (a string)"),
        ({"pad_token": ["<|im_end|>"]}, "tokenizer_config.json: pad_token: ['<|im_end|>'] must be a token (a string)"),
        ({"added_tokens_decoder": {"5": "<x>"}}, "tokenizer.json: transformers cannot use it: Found a <class 'str'>"),
        ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, "tokenizer.json: transformers cannot use it: invalid"),
        ({"added_tokens_decoder": []}, "tokenizer.json: transformers cannot use it: 'list' object has no attribute"),
        ({"model_max_length": "long"}, "tokenizer_config.json: transformers cannot use it: '>' not supported between"),
        ({"model_input_names": 1}, "tokenizer_config.json: transformers cannot use it: argument of type 'int' is not"),
        ({"split_special_tokens": True}, "tokenizer.json: tokenizer_config.json makes the tokenizer split '<|im_"),
    ],
)
def test_a_damaged_tokenizer_config(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    assert refusal(write_tokenizer(tmp_path, **changes)).removeprefix(f"{tmp_path}: ").startswith(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "tokenizer_config.json: not valid JSON: Expecting property name"),
        ("[1]", "tokenizer_config.json: holds a list; a JSON object is needed"),
        ("", "tokenizer_config.json: not valid JSON: Expecting value"),
    ],
)
def test_a_tokenizer_config_that_is_none(tmp_path: Path, text: str, told: str) -> None:
    (write_tokenizer(tmp_path) / "tokenizer_config.json").write_text(text)
    assert refusal(tmp_path).startswith(told)


def test_a_token_that_the_model_has_no_embedding_for(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path), 1000)
    check_tokenizer(tokenizer, len(tokenizer))
    with pytest.raises(TempoError, match=rf"largest token id is {len(tokenizer) - 1} \('<\|im_end\|>'\), the model's"):
        check_tokenizer(tokenizer, len(tokenizer) - 1)


# ---------------------------------------------------------------- folders without tokenizer.json


def unpacked(folder: Path, kind: str = "qwen", **changes: Any) -> Path:
    """A folder with vocab.json and merges.txt in place of tokenizer.json."""
    write_tokenizer(folder, kind, **changes)
    Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    return folder


def added_tokens(kind: str = "qwen") -> dict[str, dict[str, Any]]:
    own = Tokenizer.from_str(stored(kind))
    return {str(own.token_to_id(token)): {"content": token, "special": True, "normalized": False} for token in SPECIAL}


def test_vocabulary_and_merges_by_the_class_of_the_folder(tmp_path: Path) -> None:
    changes = {"tokenizer_class": "Qwen2Tokenizer", "model_type": "qwen3", "added_tokens_decoder": added_tokens()}
    tokenizer = load_tokenizer(unpacked(tmp_path, **changes), 1000)
    own = Tokenizer.from_str(stored("qwen"))
    assert tokenizer.get_vocab() == own.get_vocab()
    for text in (*PROBES, "<|im_start|>user\nSum 1 + 2<|im_end|>"):
        assert tokenizer.decode(ids_of(tokenizer, text)) == text
    assert ids_of(tokenizer, "What is 12 + 7 ?") == own.encode("What is 12 + 7 ?", add_special_tokens=False).ids


def test_a_sentencepiece_model_by_the_class_of_the_folder(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>")
    (tmp_path / "tokenizer.json").unlink()
    train = (
        "import sentencepiece as spm, sys; from tests.data.tokenizer_files import CORPUS;"
        "spm.SentencePieceTrainer.train(sentence_iterator=iter([l for t in CORPUS for l in t.splitlines()]),"
        " model_prefix=sys.argv[1], vocab_size=330, model_type='bpe', byte_fallback=True,"
        " normalization_rule_name='identity', remove_extra_whitespaces=False, minloglevel=2)"
    )
    subprocess.run([sys.executable, "-c", train, str(tmp_path / "tokenizer")], check=True)  # it logs to stderr
    tokenizer = load_tokenizer(tmp_path, 1000)
    assert len(tokenizer) == 330
    for text in PROBES:
        assert tokenizer.decode(ids_of(tokenizer, text)) == text


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ((), "tokenizer.json: missing; a folder needs it, or else tokenizer.model, or vocab.json and merges.txt"),
        (("vocab.json",), "tokenizer.json: missing; a folder needs it, or else tokenizer.model, or vocab.json and m"),
        (("merges.txt",), "tokenizer.json: missing; a folder needs it, or else tokenizer.model, or vocab.json and m"),
    ],
)
@pytest.mark.parametrize("named", ["Qwen2Tokenizer", "LlamaTokenizer", "GPT2Tokenizer"])
def test_a_vocabulary_is_needed(tmp_path: Path, named: str, left: tuple[str, ...], told: str) -> None:
    """transformers' classes make an empty tokenizer of nothing: Qwen's gave every prompt two tokens."""
    unpacked(tmp_path, tokenizer_class=named, model_type="qwen3")
    for name in {"vocab.json", "merges.txt"} - set(left):
        (tmp_path / name).unlink()
    assert refusal(tmp_path).startswith(told)


def test_a_class_that_loses_text(tmp_path: Path) -> None:
    """A sentencepiece file that holds one piece, as a pointer or a stub does."""
    write_tokenizer(tmp_path, tokenizer_class="LlamaTokenizer", model_type="qwen3")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    told = refusal(tmp_path)
    assert told.startswith("tokenizer.model: LlamaTokenizer, the class of this folder, does not give text back: 'What")
    assert told.endswith("a tokenizer.json is needed")


# ---------------------------------------------------------------- ids


def ids_folder(tmp_path: Path, config: dict[str, Any], generation: str | None) -> Path:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 1000, **config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(generation)
    return tmp_path


@pytest.mark.parametrize(
    ("config", "generation", "also"),
    [
        ({}, None, []),
        ({}, {}, []),
        ({"eos_token_id": None}, {"eos_token_id": None, "do_sample": True}, []),
        ({"eos_token_id": 7}, None, [7]),  # Llama 3 fine-tunes: the end of a turn is named here alone
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, [7, 8, 9]),
        ({"eos_token_id": 7}, {"do_sample": False, "temperature": 0.6, "pad_token_id": 3}, [7]),  # warned of, no more
        ({"pad_token_id": -1, "bos_token_id": 999}, {"eos_token_id": [0, 999]}, [0, 999]),
    ],
)
def test_every_end_of_sequence_stops(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, also: list[int]
) -> None:
    folder = ids_folder(tmp_path, config, None if generation is None else json.dumps(generation))
    tokenizer = load_tokenizer(folder, 1000)
    assert stop_token_ids(folder, tokenizer, 1000) == sorted({tokenizer.eos_token_id, *also})


@pytest.mark.parametrize(
    ("config", "generation", "told"),
    [
        ({}, "{\n", "generation_config.json: not valid JSON: Expecting property name"),
        ({}, "", "generation_config.json: not valid JSON: Expecting value"),
        ({}, "[]", "generation_config.json: holds a list; a JSON object is needed"),
        ({}, '{"eos_token_id": "<|im_end|>"}', "generation_config.json: eos_token_id: '<|im_end|>' must be a token id"),
        (
            {},
            '{"eos_token_id": [1, "2"]}',
            "generation_config.json: eos_token_id: '2' must be a token id from 0 to 999",
        ),
        (
            {},
            '{"eos_token_id": 1000}',
            "generation_config.json: eos_token_id: 1000 must be a token id from 0 to 999 (v",
        ),
        ({}, '{"eos_token_id": -1}', "generation_config.json: eos_token_id: -1 must be a token id from 0 to 999"),
        ({}, '{"eos_token_id": true}', "generation_config.json: eos_token_id: True must be a token id"),
        ({}, '{"eos_token_id": 2.0}', "generation_config.json: eos_token_id: 2.0 must be a token id"),
        ({}, '{"pad_token_id": 1000}', "generation_config.json: pad_token_id: 1000 must be a token id"),
        ({"eos_token_id": 151645}, None, "config.json: eos_token_id: 151645 must be a token id from 0 to 999"),
        ({"pad_token_id": 32000}, None, "config.json: pad_token_id: 32000 must be a token id from 0 to 999"),
        (
            {},
            '{"num_beams": 4, "num_return_sequences": 8}',
            "generation_config.json: transformers cannot use it: `num_return_sequences` (8) has to be smaller or equal",
        ),
        ({}, '{"max_new_tokens": 0}', "generation_config.json: transformers cannot use it: `max_new_tokens` must be"),
    ],
)
def test_ids_that_are_none(tmp_path: Path, config: dict[str, Any], generation: str | None, told: str) -> None:
    folder = ids_folder(tmp_path, config, generation)
    tokenizer = load_tokenizer(folder, 1000)
    with pytest.raises(TempoError) as caught:
        stop_token_ids(folder, tokenizer, 1000)
    assert str(caught.value).replace(f"{folder}/", "").startswith(told)
    assert "\n" not in str(caught.value)


def test_ids_of_a_config_are_checked_alone(tmp_path: Path) -> None:
    check_token_ids(tmp_path / "config.json", {"eos_token_id": [3, 4], "pad_token_id": None}, 5)
    with pytest.raises(TempoError, match=r"config.json: eos_token_id: 5 must be a token id from 0 to 4"):
        check_token_ids(tmp_path / "config.json", {"eos_token_id": [3, 5]}, 5)
