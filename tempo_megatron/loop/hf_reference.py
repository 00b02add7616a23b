"""Log-probabilities by transformers, in float32 on the CPU: a computation that shares no kernel with the other two."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from tempo_megatron.model.hf_tensors import expected_tensors

#: Parameters times tokens of one reference: a few minutes on a slow machine, in which the other ranks wait.
MOST_WORK = 3e12
#: Part of the free memory that its weights may take.
MOST_MEMORY = 0.5


def rows_within_reach(hf_config: PretrainedConfig, lengths: Sequence[int]) -> tuple[int, str]:
    """How many of the first sequences, of ``lengths`` tokens each, are few enough; of none also why."""
    parameters = sum(math.prod(shape) for shape in expected_tensors(hf_config, "actor").values())
    need, free = 4 * parameters, psutil.virtual_memory().available
    if need > MOST_MEMORY * free:
        return 0, f"{need / (1 << 30):.1f} GiB of float32 weights are too many for {free / (1 << 30):.1f} GiB of memory"
    rows = sum(parameters * tokens <= MOST_WORK for tokens in itertools.accumulate(lengths))
    return rows, "" if rows else f"{parameters:,} parameters take too long on a CPU"


@torch.no_grad()
def reference_log_probs(
    folder: Path, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], temperature: float
) -> Tensor:
    """``[T]`` float32: log p of every response token, row after row, by the HF folder's model in float32.

    Raises:
        OSError, ValueError: transformers cannot load the folder.
    """
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
    finally:
        if bars:
            logging.enable_progress_bar()
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        logits = model(ids, use_cache=False, logits_to_keep=len(response) + 1).logits[0, :-1].float()
        log_probs = (logits / temperature).log_softmax(-1)
        rows.append(log_probs.gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(rows)
