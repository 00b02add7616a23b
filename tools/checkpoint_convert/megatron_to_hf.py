"""Megatron checkpoint -> Hugging Face folder; see --help, and tempo_megatron/checkpoint/convert/."""

from __future__ import annotations

import sys

from tempo_megatron.checkpoint.convert.command import megatron_to_hf

if __name__ == "__main__":
    sys.exit(megatron_to_hf())
