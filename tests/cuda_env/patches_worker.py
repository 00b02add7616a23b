"""Run by test_cuda_env.py with the CUDA environment's interpreter: what is replaced on a GPU, and who reads it.

Prints what ``tests.library_worker`` prints, of the patches that a GPU needs. Those of the CPU are installed, because
models are built here, and not looked at.
"""

from __future__ import annotations

import json
import sys
from functools import partial

from tests.cuda_env import hopper

hopper.without_driver()

from tempo_megatron.parallel import cpu_shim  # noqa: E402


def compile_apart() -> None:
    from tempo_megatron.rollout import patches

    with patches.hf_classes_compiled_apart():
        pass


def keep_groups() -> None:
    from tempo_megatron.rollout import patches

    patches._guard_process_group()


def build_twin() -> None:
    from tempo_megatron.rollout.landings import _experts_known, _in_place_of

    with _experts_known(), _in_place_of(0, 1):
        pass


def main() -> None:
    from tempo_megatron.parallel.distributed import start
    from tests import library_worker as library

    cpu_shim.install()
    hopper.pretend()
    start(threads=1, timeout_s=60)
    models = [partial(library.build_model, name) for name in ("qwen3", "qwen3-moe", "olmo3")]
    rollout = [compile_apart, keep_groups, build_twin, library.build_fp8_twin]
    told = library.told_without([*models, *rollout, library.write_checkpoints, library.make_groups])
    unread = [pair for pair in json.loads(sys.argv[1]) if not library.mentions(*pair)]
    print(json.dumps({"gone": told, "unread": unread}))


if __name__ == "__main__":
    main()
