"""The tokenizer of an HF folder, and the ids that its files name.

Where ``tokenizer.json`` exists it is the tokenizer, as it is.  transformers' own classes are not asked then: they take
the vocabulary out of it and put a pre-tokenizer and a decoder of their own beside it, and a byte-level tokenizer in a
folder that names LlamaTokenizer (DeepSeek's do) loses every space and newline.
"""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tempo_megatron.errors import TempoError
from tempo_megatron.lfs import refuse_lfs_pointer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
CONFIG = "config.json"

#: Texts that a tokenizer must encode and decode as its file says (all of them in the composed form, NFC).
PROBES = (
    "What is 12 + 7?",
    "def add(a, b):\n    return a + b\n",
    "two  spaces\tand a tab, then lines\n\n\nand  more \n \n",
    "1234567 3.14159 1,000,000 -5 x2",
    "I'll say it's “naïve café” \u2014 ½ ≤ √2",
    "数学は楽しい。한국어 Привет עברית",
    "👩\u200d🔬 🇫🇷 ∑∫∂",
    "\\boxed{\\frac{1}{2}} $x^2_i$ <b>[a]</b> {}",
)


def load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of an HF folder, with the special tokens and the chat templates that lie beside it.

    Without ``tokenizer.json`` the class that ``tokenizer_config.json`` names makes it of ``tokenizer.model``, or of
    ``vocab.json`` and ``merges.txt``; it must then give text back as it was.

    Raises:
        TempoError: naming file and key or text: no tokenizer, one that loses text or differs from its file, a special
            token that it does not have, an id that the model has no embedding for, no end-of-sequence token.
    """
    _check_tokenizer_config(folder / TOKENIZER_CONFIG)
    tokenizer = _from_tokenizer_json(folder) if (folder / TOKENIZER).is_file() else _from_named_class(folder)
    tokenizer.clean_up_tokenization_spaces = False  # true would take spaces out of decoded text
    check_tokenizer(tokenizer, vocab_size)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises TempoError when the model has no embedding for some token id, or when there is no EOS token."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    name = tokenizer.name_or_path
    if largest >= vocab_size:
        raise TempoError(
            f"{name}: the tokenizer's largest token id is {largest} ({token!r}), the model's vocab_size is "
            f"{vocab_size}; the tokenizer of this very model is needed"
        )
    if tokenizer.eos_token_id is None:
        raise TempoError(f"{name}: the tokenizer has no eos_token; set it in {TOKENIZER_CONFIG}")


def response_decoder(
    tokenizer: PreTrainedTokenizerBase, keep: Callable[[str], bool]
) -> Callable[[Sequence[Sequence[int]]], list[str]]:
    """Token ids of responses -> their texts, without special tokens but for those whose text ``keep`` takes.

    Some folders mark ``</think>`` as special; a text without it would be judged as if all of it were the answer.
    """
    added = tokenizer.added_tokens_decoder
    hidden = {id for id, token in added.items() if token.special and not keep(token.content)}
    return lambda responses: [tokenizer.decode([id for id in ids if id not in hidden]) for ids in responses]


def _from_tokenizer_json(folder: Path) -> PreTrainedTokenizerBase:
    path = folder / TOKENIZER
    stored = _read_tokenizer(path)
    with _refused(path):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    _check_special_tokens(tokenizer, stored.get_vocab(), path)
    _check_keeps_text(stored, path)
    special = [token for token in tokenizer.all_special_tokens if stored.token_to_id(token) is not None]
    for text in (*PROBES, *(f"{token}user\n x{token}" for token in special)):
        ids = stored.encode(text, add_special_tokens=False).ids
        with _refused(folder / TOKENIZER_CONFIG):
            found, back = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.decode(ids)
        if found != ids:
            raise TempoError(f"{path}: {TOKENIZER_CONFIG} makes the tokenizer split {text!r} otherwise than this file")
        if back != stored.decode(ids, skip_special_tokens=False):
            raise TempoError(f"{path}: {TOKENIZER_CONFIG} makes the tokenizer decode {text!r} otherwise than this file")
    return tokenizer


def _from_named_class(folder: Path) -> PreTrainedTokenizerBase:
    vocabulary = next((folder / name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()), None)
    if vocabulary is None or (vocabulary.name == "vocab.json" and not (folder / "merges.txt").is_file()):
        raise TempoError(
            f"{folder / TOKENIZER}: missing; a folder needs it, or else tokenizer.model, or vocab.json and merges.txt"
        )
    with _refused(vocabulary):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        known = _tokens_of(vocabulary)
    made = type(tokenizer).__name__
    lost = sorted(known - tokenizer.get_vocab().keys())
    if lost:
        raise TempoError(
            f"{vocabulary}: {made}, the class of this folder, does not take {len(lost)} of its {len(known)} tokens "
            f"(such as {lost[0]!r}); a {TOKENIZER} is needed"
        )
    for text in PROBES:
        with _refused(folder / TOKENIZER_CONFIG):
            back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        if back != text:
            raise TempoError(
                f"{vocabulary}: {made}, the class of this folder, does not give text back: {text!r} becomes {back!r}; "
                f"a {TOKENIZER} is needed"
            )
    return tokenizer


def _tokens_of(vocabulary: Path) -> set[str]:
    """What vocab.json lists; nothing for tokenizer.model, whose class renames some tokens."""
    return set(json.loads(vocabulary.read_text("utf-8"))) if vocabulary.name == "vocab.json" else set()


def _read_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json by the library of that format alone, without truncation or padding."""
    refuse_lfs_pointer(path)
    try:
        stored = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other class
        raise TempoError(f"{path}: not a tokenizer that can be read ({_short(error)})") from error
    stored.no_truncation()
    stored.no_padding()
    return stored


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, stored: dict[str, int], path: Path) -> None:
    """transformers gives a special token that the file lacks an id of its own, which the model never saw."""
    stated = {str(token): id for id, token in tokenizer.init_kwargs.get("added_tokens_decoder", {}).items()}
    for token, id in tokenizer.get_vocab().items():
        if token not in stored and stated.get(token) != id:
            keys = [key for key, value in tokenizer.special_tokens_map.items() if str(value) == token]
            key = keys[0] if keys else "extra_special_tokens"
            raise TempoError(f"{path.with_name(TOKENIZER_CONFIG)}: {key} {token!r} is not a token of {path.name}")


def _check_keeps_text(stored: Tokenizer, path: Path) -> None:
    """A vocabulary over bytes can say any text: it comes back, or the pre-tokenizer or the decoder is not its own."""
    vocabulary = stored.get_vocab()
    byte_level = "Ġ" in vocabulary and "Ċ" in vocabulary  # a space and a newline in GPT-2's alphabet of bytes
    if not byte_level and "<0x0A>" not in vocabulary:
        return
    for text in PROBES:
        back = stored.decode(stored.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        if unicodedata.normalize("NFKC", back) != unicodedata.normalize("NFKC", text):
            raise TempoError(
                f"{path}: loses text: {text!r} comes back as {back!r}; its pre-tokenizer or decoder is not that of its "
                "vocabulary (transformers 5 saves such files); take the one that the model was published with"
            )


def _check_tokenizer_config(path: Path) -> None:
    if not path.is_file():
        return
    for key, value in read_object(path).items():
        content = value.get("content", value) if isinstance(value, dict) else value
        if key in PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES and not isinstance(content, str | None):
            raise TempoError(f"{path}: {key}: {value!r} must be a token (a string)")


# ---------------------------------------------------------------- ids


def stop_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Every end-of-sequence id: the tokenizer's, and those of config.json and generation_config.json, ascending.

    All three are taken, because in published folders any one of them may be the only one that names the token with
    which the chat template ends a turn.

    Raises:
        TempoError: naming the file and the key: generation_config.json is not one, or an id is not in the vocabulary.
    """
    ids = {int(tokenizer.eos_token_id)}
    for name in (CONFIG, GENERATION_CONFIG):
        path = folder / name
        if path.is_file():
            values = read_object(path)
            check_token_ids(path, values, vocab_size)
            ids.update(_as_list(values.get("eos_token_id")))
    if (folder / GENERATION_CONFIG).is_file():
        with _refused(folder / GENERATION_CONFIG):  # what transformers would refuse in the folder that is exported
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    return sorted(ids)


def check_token_ids(path: Path, values: dict[str, Any], vocab_size: int) -> None:
    """TempoError if a special token's id in ``values``, which were read from ``path``, is none of the vocabulary's."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for id in _as_list(values.get(key)):
            unset = id == -1 and key != "eos_token_id"  # what the first Llama folders say
            if type(id) is not int or not (unset or 0 <= id < vocab_size):
                raise TempoError(
                    f"{path}: {key}: {id!r} must be a token id from 0 to {vocab_size - 1} (vocab_size - 1)"
                )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# ---------------------------------------------------------------- files


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; TempoError naming the file otherwise."""
    refuse_lfs_pointer(path)
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # JSONDecodeError, UnicodeDecodeError
        raise TempoError(f"{path}: not valid JSON: {_short(error)}") from error
    if not isinstance(values, dict):
        raise TempoError(f"{path}: holds a {type(values).__name__}; a JSON object is needed")
    return values


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """What transformers raises over a file of a tokenizer or of a generation config, as one line; no warnings."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise TempoError(f"{path}: transformers cannot use it: {_short(error)}") from error
    finally:
        logger.setLevel(level)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
