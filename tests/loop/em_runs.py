"""Several small EM runs, one after the other, in one set of ranks; launched by the tests of this folder.

``em_worker CASES.json``: a list of ``{"config", "overrides": [...], "out", "ends_in_error", "stops", "spoils"}``
(``cases.Case``); every case's rank 0 writes ``OUT`` (torch file): what its steps sampled and computed, and the final
weights or the error that ended it.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from tempo_megatron.config.load import load_config  # noqa: E402
from tempo_megatron.data.isolated import read_eval_isolated, read_prompts_isolated  # noqa: E402
from tempo_megatron.data.prompts import PromptSet  # noqa: E402
from tempo_megatron.data.ragged import Ragged  # noqa: E402
from tempo_megatron.errors import RunError  # noqa: E402
from tempo_megatron.locate import newest_checkpoint  # noqa: E402
from tempo_megatron.loop import data, runtime, stopping  # noqa: E402
from tempo_megatron.loop.collect import Collector  # noqa: E402
from tempo_megatron.loop.em import EMLoop  # noqa: E402
from tempo_megatron.loop.session import Session  # noqa: E402
from tempo_megatron.loop.sft import SFTLoop  # noqa: E402
from tempo_megatron.parallel.distributed import on_rank0  # noqa: E402
from tempo_megatron.parallel.parts import awake  # noqa: E402
from tempo_megatron.rollout.engine import RolloutEngine  # noqa: E402
from tempo_megatron.training.engine import MegatronEngine, StepResult  # noqa: E402
from tempo_megatron.verifiers.service import VerifierService  # noqa: E402
from tests.everywhere import everywhere  # noqa: E402

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
    settings.pop("sleeps")  # on the CPU an engine is the same
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
def shared_verifier(
    sources: dict[str, list[str]], config: Any, answer_types: dict[str, str]
) -> Iterator[VerifierService]:
    """One set of verifier processes for all cases with the same answers; they end with this process."""
    key = f"{sources} {config.model_dump_json()} {answer_types}"
    if key not in _verifiers:
        _verifiers[key] = VerifierService(sources, config, answer_types)
    yield _verifiers[key]


@cache
def read_once(read: Callable[..., PromptSet], files: tuple[str, ...], answer_types: tuple[Any, ...]) -> PromptSet:
    """The reading process costs more than a small case; every file is read by one once."""
    return read(files, dict(answer_types))


def shared_reading(read: Callable[..., PromptSet]) -> Callable[..., PromptSet]:
    return lambda files, answer_types: read_once(read, tuple(files), tuple(answer_types.items()))


data.read_prompts_isolated = shared_reading(read_prompts_isolated)  # type: ignore[assignment]
data.read_eval_isolated = shared_reading(read_eval_isolated)  # type: ignore[assignment]
runtime.VerifierService = shared_verifier  # type: ignore[assignment,misc]
runtime.RolloutEngine = shared_rollout_engine  # type: ignore[assignment,misc]


def watch(engine: MegatronEngine, seen: list[dict[str, Any]], layer_calls: dict[str, int]) -> None:
    """Note the outputs of every forward and step of an engine, and how the steps call its first layer."""
    step, forward = engine.step, engine.forward
    layer_calls |= {"with gradient": 0, "without": 0}

    def count(*_: Any) -> None:
        layer_calls["with gradient" if torch.is_grad_enabled() else "without"] += 1

    def watched_step(*args: Any) -> StepResult:
        hook = engine.models[0].decoder.layers[0].register_forward_hook(count)
        result = step(*args)
        hook.remove()
        seen.append({"loss": result.loss, "grad_norm": result.grad_norm, **tables(result.outputs)})
        return result

    def watched_forward(*args: Any) -> dict[str, Ragged]:
        result = forward(*args)
        seen.append(tables(result))
        return result

    engine.step, engine.forward = watched_step, watched_forward  # type: ignore[method-assign]


def tables(outputs: dict[str, Ragged]) -> dict[str, torch.Tensor]:
    return {name: everywhere(rows).padded() for name, rows in outputs.items()}


def watch_collector(collector: Collector, steps: list[dict[str, Any]]) -> None:
    """Note what every step collected, and all that was sampled for it."""
    collect, generate = collector.collect, collector._generate

    def watched_collect(*args: Any, **kwargs: Any) -> Any:
        steps.append({"rounds": []})
        collected = collect(*args, **kwargs)
        b = collected.batch
        steps[-1] |= {
            "tokens": everywhere(b.response_token_ids).tolist(),
            "prompts": b.prompt_token_ids,
            "log_probs": everywhere(b.rollout_log_probs).padded(),
            "texts": everywhere(b.responses).texts(),
            "ids": b.record_ids,
            "labeled": b.labeled,
            "outcome": b.outcome,
            "group": b.group,
            "version": b.weights_version,
            "for_actor": collected.for_actor,
            "for_critic": collected.for_critic,
        }
        return collected

    def watched_generate(*args: Any) -> Any:
        r = generate(*args)
        tokens = everywhere(r.response_token_ids).tolist()
        texts = everywhere(r.responses).texts()
        sampled = {"ids": r.record_ids, "texts": texts, "tokens": tokens, "group": r.group}
        steps[-1]["rounds"].append({**sampled, "labeled": r.labeled})
        return r

    collector.collect, collector._generate = watched_collect, watched_generate  # type: ignore[method-assign]


@contextmanager
def asked_at_boundary(number: int) -> Iterator[None]:
    """The last rank is asked to save and end when it comes to the boundary of this number, counted from 0."""
    asked_by, passed = stopping.asked_by, count()

    def asked() -> signal.Signals | None:
        at = next(passed)
        return signal.SIGUSR1 if at >= number and dist.get_rank() == dist.get_world_size() - 1 else None

    stopping.asked_by = asked
    try:
        yield
    finally:
        stopping.asked_by = asked_by


def spoil_updates(patch: pytest.MonkeyPatch, how_many: int) -> None:
    """vLLM has another norm than it was sent, after the first so many updates."""
    right, left = RolloutEngine.update_weights, how_many

    def spoil(model: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight[::2].mul_(2)  # all of it would be another temperature

    def wrong(self: RolloutEngine, *args: Any) -> None:
        nonlocal left
        right(self, *args)
        if left > 0:
            left -= 1
            self._llm.apply_model(spoil)

    patch.setattr(RolloutEngine, "update_weights", wrong)


def stop_everywhere(config: Any, left_at: list[str], number: int) -> None:
    """One boundary a start, until only the last step's end is left to the caller, or once at that of this ``number``;
    notes the checkpoints, and keeps the first one behind an E-step in ``OUT/left``.
    """
    while not (number > 1 and left_at):
        with Session(config) as session, asked_at_boundary(number):
            done = (SFTLoop(session) if config.stage == "sft" else EMLoop(session)).run()
        newest = newest_checkpoint(Path(config.output_dir))
        assert newest is not None
        if done:
            return
        assert newest.name not in left_at
        if newest.name.endswith("+estep") and not any(name.endswith("+estep") for name in left_at):
            on_rank0(partial(shutil.copytree, newest, Path(config.output_dir) / "left" / newest.name))
        left_at.append(newest.name)


def run_case(case: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if case["spoils"]:
            spoil_updates(patch, 99)
        _run(
            case["config"],
            case["overrides"],
            Path(case["out"]),
            ends_in_error=case["ends_in_error"],
            stops=case["stops"],
        )


def _run(config_file: str, overrides: list[str], out: Path, *, ends_in_error: bool, stops: bool | int) -> None:
    config = load_config(config_file, overrides)
    samples: list[dict[str, Any]] = []
    seen: dict[str, list[dict[str, Any]]] = {"actor": [], "critic": []}
    layer_calls: dict[str, dict[str, int]] = {"actor": {}, "critic": {}}
    error = ""
    left_at: list[str] = []
    if stops:
        stop_everywhere(config, left_at, int(stops))
    with Session(config) as session:
        for role, engine in session.engines.items():
            watch(engine, seen[role], layer_calls[role])
        loop = SFTLoop(session) if config.stage == "sft" else EMLoop(session)
        if isinstance(loop, EMLoop):
            watch_collector(loop.collector, samples)
        if ends_in_error:
            with pytest.raises(RunError) as caught:
                loop.run()
            error = str(caught.value)
        else:
            loop.run()
        weights = {}
        for role, engine in session.engines.items():
            with awake(engine.parts.weights):
                weights |= {f"{role}.{name}": tensor.clone() for name, tensor in engine.weight_stream(64)}
        if session.is_main:
            result = {
                "samples": samples,
                "seen": seen,
                "layer_calls": layer_calls,
                "weights": weights,
                "error": error,
                "left_at": left_at,
            }
            torch.save(result, out)
    close_groups()


def main() -> None:
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_case(case)
    for verifier in _verifiers.values():
        verifier.close()
