"""Several small EM runs, one after the other, in one set of ranks; launched by the tests of this folder.

``em_worker CASES.json``: a list of ``{"name", "overrides": {...}, "out"}``; every case's rank 0 writes
``OUT`` (torch file): what the first steps sampled and computed, and the final weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.config.load import load_config  # noqa: E402
from tempo_megatron.data.prompts import PromptRecord, read_prompts_isolated  # noqa: E402
from tempo_megatron.loop import data, runtime  # noqa: E402
from tempo_megatron.loop.em import EMLoop  # noqa: E402
from tempo_megatron.loop.session import Session  # noqa: E402
from tempo_megatron.loop.sft import SFTLoop  # noqa: E402
from tempo_megatron.rollout.engine import RolloutEngine  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine, StepResult  # noqa: E402
from tempo_megatron.verifiers.service import VerifierService  # noqa: E402

_built: dict[str, tuple[RolloutEngine, Any]] = {}
_kept_groups: set[dist.ProcessGroup] = set()


def open_groups() -> set[dist.ProcessGroup]:
    return set(dist.distributed_c10d._world.pg_map)


def close_groups() -> None:
    """Of the case that has ended: every group has threads of its own, and a run makes a dozen of them."""
    for group in open_groups() - _kept_groups - {dist.group.WORLD}:
        dist.destroy_process_group(group)


def shared_rollout_engine(hf_dir: Path, config: Any, **settings: Any) -> RolloutEngine:
    """One vLLM engine for all cases with the same model and settings: building it is most of a small case's time.

    Every run starts by bringing its own weights, which also empties the prefix cache.
    """
    key = f"{(hf_dir / 'config.json').read_text()} {config.model_dump_json()} {settings}"
    if key not in _built:
        for _, close in _built.values():
            close()
        _built.clear()
        before = open_groups()
        engine = RolloutEngine(hf_dir, config, **settings)
        _kept_groups.update(open_groups() - before)
        _built[key] = engine, engine.close
        engine.close = lambda: None  # type: ignore[method-assign]
    return _built[key][0]


_verifiers: dict[str, VerifierService] = {}


@contextmanager
def shared_verifier(sources: dict[str, list[str]], config: Any) -> Iterator[VerifierService]:
    """One set of verifier processes for all cases with the same answers; they end with this process."""
    key = f"{sources} {config.model_dump_json()}"
    if key not in _verifiers:
        _verifiers[key] = VerifierService(sources, config)
    yield _verifiers[key]


@cache
def read_once(files: tuple[str, ...]) -> list[PromptRecord]:
    """The reading process costs more than a small case; every file is read by one once."""
    return read_prompts_isolated(files)


data.read_prompts_isolated = lambda files: read_once(tuple(files))
runtime.VerifierService = shared_verifier  # type: ignore[assignment,misc]
runtime.RolloutEngine = shared_rollout_engine  # type: ignore[assignment,misc]


def watch(engine: MegatronEngine, seen: list[dict[str, Any]]) -> None:
    """Note the outputs of every forward and step of an engine."""
    step, forward = engine.step, engine.forward

    def watched_step(*args: Any) -> StepResult:
        result = step(*args)
        seen.append({"loss": result.loss, "grad_norm": result.grad_norm, **result.outputs})
        return result

    def watched_forward(*args: Any) -> dict[str, torch.Tensor]:
        result = forward(*args)
        seen.append(dict(result))
        return result

    engine.step, engine.forward = watched_step, watched_forward  # type: ignore[method-assign]


def run_case(config_file: str, overrides: list[str], out: Path) -> None:
    config = load_config(config_file, overrides)
    batches: list[Any] = []
    seen: dict[str, list[dict[str, Any]]] = {"actor": [], "critic": []}
    with Session(config) as session:
        for role, engine in session.engines.items():
            watch(engine, seen[role])
        if config.stage == "sft":
            SFTLoop(session).run()
        else:
            loop = EMLoop(session)
            collect = loop.collector.collect

            def watched_collect(*args: Any, **kwargs: Any) -> Any:
                collected = collect(*args, **kwargs)
                batches.append(collected.batch)
                return collected

            loop.collector.collect = watched_collect  # type: ignore[method-assign]
            loop.run()
        weights = {
            f"{role}.{name}": tensor.clone()
            for role, engine in session.engines.items()
            for name, tensor in engine.weight_stream(64)
        }
        if session.is_main:
            samples = [
                {
                    "tokens": b.response_token_ids,
                    "prompts": b.prompt_token_ids,
                    "log_probs": b.rollout_log_probs,
                    "texts": b.responses,
                    "ids": b.record_ids,
                    "labeled": b.labeled,
                    "outcome": b.outcome,
                    "group": b.group,
                    "version": b.weights_version,
                }
                for b in batches
            ]
            torch.save({"samples": samples, "seen": seen, "weights": weights}, out)
    close_groups()


def main() -> None:
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_case(case["config"], case["overrides"], Path(case["out"]))
    for verifier in _verifiers.values():
        verifier.close()
