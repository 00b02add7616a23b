"""Small tokenizers of the kinds that models are published with, and folders that hold them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = ["What is 12 + 7 ? The answer is 19 .", "def add(a, b):\n    return a + b\n", "∑ naïve café 数学 x2"] * 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"

#: Pre-tokenizers of byte-level BPE: Qwen's (one digit a token), Llama 3's (three), SmolLM2's.
SPLITS = {
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
    "llama3": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "digits": None,
}
KINDS = (*SPLITS, "sentencepiece")


@cache
def stored(kind: str) -> str:
    """tokenizer.json of this kind."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "sentencepiece", unk_token=None))
    if kind == "sentencepiece":  # as Llama 2's: spaces are U+2581, what is not in the vocabulary goes by bytes
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
        # the bytes are plain tokens of the vocabulary there, not added ones
        values = json.loads(tokenizer.to_str())
        values["added_tokens"] = []
        tokenizer = Tokenizer.from_str(json.dumps(values))
    else:
        pattern = SPLITS[kind]
        split = (
            pre_tokenizers.Split(Regex(pattern), "isolated")
            if pattern
            else pre_tokenizers.Digits(individual_digits=True)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return str(tokenizer.to_str())


def write_tokenizer(folder: Path, kind: str = "qwen", model_type: str = "llama", **changes: Any) -> Path:
    """tokenizer.json, tokenizer_config.json (some keys changed; "absent": left out) and a config.json; the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(stored(kind), "utf-8")
    values = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": TEMPLATE, **changes}
    kept = {key: value for key, value in values.items() if value != "absent"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept), "utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 1000}), "utf-8")
    return folder
