"""Hugging Face folder -> Megatron checkpoint; see --help, and tempo_megatron/checkpoint/convert/."""

from __future__ import annotations

import sys

from tempo_megatron.checkpoint.convert.command import hf_to_megatron

if __name__ == "__main__":
    sys.exit(hf_to_megatron())
