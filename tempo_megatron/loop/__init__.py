"""The stages of a run; the only room that knows every other."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from tempo_megatron.cluster.lifetime import say
from tempo_megatron.cluster.stop_request import leave_undisturbed
from tempo_megatron.config.scaled import ScaledJob
from tempo_megatron.config.schema import Config
from tempo_megatron.imports import uncollected
from tempo_megatron.telemetry.progress import run_title

_told = False


def load_libraries(config: Config) -> None:
    """Import what a rank of the config's stage needs, once in a process; changes nothing but that."""
    global _told
    if not _told:  # a rank that was forked hears it of its launcher
        _tell(f"{run_title(config.stage, config.output_dir)} importing torch, Megatron and vLLM")
        _told = True
    with uncollected():
        load_megatron()
        if config.stage == "sft":
            importlib.import_module("tempo_megatron.loop.sft")
        else:
            _load_with_vllm("tempo_megatron.loop.em")


def load_evaluation_libraries() -> None:
    """Import what a rank of an evaluation needs, once in a process; changes nothing but that."""
    with uncollected():
        load_megatron()
        _load_with_vllm("tempo_megatron.loop.evaluate_model")


def load_doctor_libraries() -> None:
    """Import what a rank of ``doctor --mismatch`` needs, once in a process; changes nothing but that."""
    with uncollected():
        load_megatron()
        _load_with_vllm("tempo_megatron.loop.doctor")


def load_examination() -> None:
    """Import what a rank of ``doctor`` needs, once in a process; changes nothing but that."""
    with uncollected():
        load_megatron()
        importlib.import_module("tempo_megatron.loop.examine_job")


def run_examination(config: Config, json_file: Path | None) -> None:
    """Look at what a run of ``config`` rests on; every rank of the job calls it.

    Raises:
        RunError: there is a fault.
    """
    load_examination()
    from tempo_megatron.loop.examine_job import examine_job

    examine_job(config, json_file)


def _load_with_vllm(module: str) -> None:
    importlib.import_module(module)
    from tempo_megatron.rollout.engine import load_vllm

    load_vllm()


def load_megatron() -> None:
    """Prepare the import of Megatron, on the CPU by its shim."""
    from tempo_megatron.parallel import cpu_shim

    cpu_shim.install()  # before anything imports megatron.core


def run(config: Config) -> bool:
    """Run the config's stage on this rank; every rank of the job calls it. Raises TempoError on bad input.

    Returns:
        True when the run has saved and ended before its end, as it was asked to.
    """
    load_libraries(config)
    from tempo_megatron.loop.em import EMLoop
    from tempo_megatron.loop.session import Session
    from tempo_megatron.loop.sft import SFTLoop
    from tempo_megatron.parallel.distributed import finish, gather_objects

    with Session(config) as session:
        loop = SFTLoop(session) if config.stage == "sft" else EMLoop(session)
        stopped = not loop.run()
    if stopped:
        leave_undisturbed()
        gather_objects(
            None
        )  # all have closed: a launcher ends the others once the first rank has left with a code that is not 0
    finish()
    return stopped


def run_dry(config: Config, world_size: int) -> None:
    """Check what can be checked of a job on ``world_size`` ranks, in this process. Raises TempoError on bad input."""
    load_megatron()
    from tempo_megatron.loop.dry_run import dry_run

    dry_run(config, world_size)


def run_dry_at_scale(config: Config, job: ScaledJob) -> None:
    """Walk through one step of a job of any size, in this process. Raises TempoError for what it would end with."""
    with uncollected():
        load_megatron()
        from tempo_megatron.loop.scale.command import dry_run_at_scale

    dry_run_at_scale(config, job)


def run_evaluation(config: Config, compare_with: Path | None = None) -> None:
    """Evaluate the config's models on its sets; every rank of the job calls it.

    Args:
        compare_with: another evaluation's ``evaluation.json``, for paired differences.

    Raises:
        TempoError: bad input.
    """
    load_evaluation_libraries()
    from tempo_megatron.loop.evaluate_model import evaluate_model
    from tempo_megatron.parallel.distributed import finish

    evaluate_model(config, compare_with)
    finish()


def run_mismatch(config: Config, prompts: int, max_tokens: int, output: Path | None = None) -> None:
    """Say why vLLM's log-probabilities are not Megatron's; every rank of the job calls it.

    Args:
        prompts: to sample, at most.
        max_tokens: of a response.
        output: folder for ``doctor-mismatch.json``; None: nothing is written.

    Raises:
        TempoError: bad input; as a RunError the mismatch with its most likely cause.
    """
    load_doctor_libraries()
    from tempo_megatron.loop.doctor import examine_mismatch
    from tempo_megatron.parallel.distributed import finish

    examine_mismatch(config, prompts, max_tokens, output)
    finish()


def _tell(text: str) -> None:
    """On rank 0, before there are ranks."""
    if os.environ.get("RANK", "0") == "0":
        say(text)
