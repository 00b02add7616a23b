"""HF folders in and out: safetensors shards with an index, config and tokenizer carried along.

Reading is in ``hf_read``, writing in ``hf_write``; critics' heads are in ``critic_format``.
"""

from __future__ import annotations

from tempo_megatron.checkpoint.hf_read import HFTensors, load_hf_config
from tempo_megatron.checkpoint.hf_write import SIDE_FILES, HFWriter, copy_side_files

__all__ = ["SIDE_FILES", "HFTensors", "HFWriter", "copy_side_files", "load_hf_config"]
