"""Seeds of samples: a pure function of what is sampled, never of who samples it."""

from __future__ import annotations

import hashlib
import json

_SEED_BITS = 62  # leaves room for "+ i" below 2**63, the largest seed vLLM takes


def sample_seed(run_seed: int, stage_tag: str, step: int, record_id: str, draw: int) -> int:
    """Seed of the first sample of one prompt draw; sample i of the draw uses this seed + i.

    Stable over Python versions, hosts and processes (BLAKE2b of the arguments), so that a resumed run, another
    number of replicas or another order of the prompts samples the same responses.

    Args:
        run_seed: ``config.seed``.
        stage_tag: what the samples are for, such as ``"train"`` or ``"eval:held-out"``.
        step: training step.
        record_id: id of the prompt record.
        draw: 0, 1, ... when a record is drawn more than once in the step.

    Returns:
        An integer in [0, 2**62).
    """
    key = json.dumps([run_seed, stage_tag, step, record_id, draw], ensure_ascii=True)
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)
