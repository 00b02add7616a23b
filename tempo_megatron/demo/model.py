"""The demo's model: a real Hugging Face folder of a tiny Qwen3 with a tokenizer of one token per character."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tempo_megatron.verifiers.kinds.guess_check import DIGITS

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = DIGITS + "=:;+-"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; the chat template is the messages' text as it is."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """About 150 thousand parameters; the vocabulary is padded to a multiple of 8 (tensor parallel up to 8)."""
    return Qwen3Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        # 14 positions: a larger base leaves most of the 16 frequencies flat over them
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        # 0.5 / sqrt(hidden); with the usual 0.02 a model this narrow needs several times the steps
        initializer_range=0.0625,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def write_model(folder: Path | str, seed: int) -> Path:
    """Writes configuration, random weights of ``seed``, tokenizer and generation settings; returns the folder."""
    folder = Path(folder)
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(make_config(tokenizer)).float()
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
