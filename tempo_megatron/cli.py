"""The command line: argument parsing, and the one place that ends the process.

Exit codes: 0 done; 1 a fault of the program (with its traceback); 2 bad input or configuration; 3 the run
failed; 4 another rank has ended or does not answer, or one makes no progress; 75 saved and ended, as it was asked to:
it goes on when it is started again; 128 + n a signal (130 Ctrl-C, 143 SIGTERM, 137 a killed rank).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from tempo_megatron import __version__
from tempo_megatron.cluster import stop_request
from tempo_megatron.cluster.claim import check_unclaimed
from tempo_megatron.cluster.launch import RankInfo, rank_environment, rank_from_environment, ranks_of_node
from tempo_megatron.cluster.lifetime import (
    EXIT_STOPPED,
    end_on_signals,
    follow_launcher,
    is_spawned,
    print_stacks_on_signal,
    say,
    stop_message,
    use_own_temporary_folder,
)
from tempo_megatron.cluster.limits import check_limits
from tempo_megatron.cluster.local import spawn_ranks
from tempo_megatron.cluster.submit import add_arguments as submit_arguments
from tempo_megatron.cluster.submit import run_submit
from tempo_megatron.config.scaled import ScaledJob, add_scaled_arguments, scaled_job
from tempo_megatron.data.prepare.command import add_arguments as data_arguments
from tempo_megatron.doctor import run as doctor
from tempo_megatron.doctor.start import check_start
from tempo_megatron.errors import TempoError
from tempo_megatron.failures import tell
from tempo_megatron.planner.command import HELP as PLAN_HELP
from tempo_megatron.planner.command import add_arguments as plan_arguments

if TYPE_CHECKING:
    from tempo_megatron.config.schema import Config

#: Seconds between a failing rank's last words and its end: srun --kill-on-bad-exit drops what is still on its way.
LAST_WORDS_S = 0.5

EXAMPLES = """examples:
  tempo-megatron demo                                     the toy task, a few minutes on two cores
  tempo-megatron demo --study                             every method on it, over several seeds
  tempo-megatron train --config configs/x.yaml            on this node, launch.nproc_per_node ranks
  tempo-megatron train --config configs/x.yaml steps=20 actor.optimizer.lr=1e-6
  tempo-megatron train --config configs/x.yaml --dry-run  check settings, models and data, start nothing
  tempo-megatron train --config configs/x.yaml --dry-run --nodes 64 --gpus-per-node 8    walk through a step of that job
  torchrun --nnodes 2 --nproc-per-node 8 -m tempo_megatron train --config configs/x.yaml
  srun --kill-on-bad-exit=1 python -m tempo_megatron train --config configs/x.yaml
  tempo-megatron submit --config configs/x.yaml --nodes 4 the same as a Slurm job
  tempo-megatron evaluate runs/x                          the newest checkpoint of a run, on the run's sets
  tempo-megatron evaluate models/x --set aime=data/aime24.parquet --samples 32 rollout.temperature=0.6
  tempo-megatron doctor --config configs/x.yaml           what this machine, its folders and the job's network lack
  tempo-megatron doctor --mismatch runs/x                 why vLLM's log-probabilities are not Megatron's
  tempo-megatron convert hf-to-megatron --hf models/x --megatron models/x-megatron --verify
  tempo-megatron sync-plan --hf models/x --ranks 32 --tp 8 --pp 4 --rollout-tp 4
  tempo-megatron data prepare aime2024 --input aime24.parquet --output d_u.parquet --unlabeled
  tempo-megatron report runs/a runs/b --output compare.html
"""

TRAIN_HELP = """Train one stage as a YAML file says: sft, ppo, grpo, tempo, ttrl, empo, oracle or random.

Under torchrun or srun every process is one rank. Otherwise launch.nproc_per_node ranks are started here.
key=value overrides the file; the value is YAML, a number indexes a list:
  steps=20   critic.optimizer.lr=1e-5   data.train_files=[a.parquet,b.parquet]   evaluation.sets.0.limit=64
--dry-run prints the resolved settings and checks them against models, tokenizer and data, without ranks or models;
launch.nproc_per_node then stands for all ranks of the job.
"""


EVALUATE_HELP = """Sample evaluation sets from a model, verify the responses, and judge the policy and its critic.

MODEL is an HF folder, a checkpoint, or a run folder (its newest checkpoint); a checkpoint's own critic judges too.
Settings come from --config, or else from the config.yaml of the run that MODEL lies in: its sets, lengths, sampling and
layouts. Where there is neither, --set names what to evaluate and key=value the rest. Launched as train is:
launch.nproc_per_node ranks are started here, unless torchrun or srun started this.

A checkpoint evaluated with its run's settings gives the figures that the run itself recorded at that step.
"""

SYNC_HELP = (
    """What an update of the rollout's weights moves in a job of any size, by plan alone: no weights, no ranks."""
)

SYNC_SIZES = {
    "tp": "the actor's tensor-parallel ranks",
    "pp": "its pipeline stages",
    "vpp": "its chunks of layers per stage",
    "cp": "its context-parallel ranks",
    "ep": "its expert-parallel ranks",
    "etp": "ranks that share each of its experts",
    "rollout-tp": "ranks of a vLLM replica",
}

DOCTOR_HELP = """--mismatch RUN says why vLLM's log-probabilities of its samples are not Megatron's, where mismatch/* or
rollout.max_log_prob_diff told that they differ. RUN is a run folder (its newest checkpoint), a checkpoint or an HF
folder. A few prompts are sampled and scored as the run does, then with one thing done otherwise: weights, kernel,
temperature, position shift, tokenizer, top_p and top_k. Settings and launching are those of evaluate; prompts are the
first of the evaluation sets, or else of the training files. Exit code 0: they agree; 3: they do not, and most likely
why.

  tempo-megatron doctor --mismatch runs/x
  tempo-megatron doctor --mismatch runs/x/checkpoints/step_00000010 --tokens 2048 --output runs/x/doctor
  tempo-megatron doctor --mismatch models/x --set aime=data/aime24.parquet actor.dtype=float32 rollout.dtype=float32
"""

STUDY_HELP = """Every method on the toy task, in runs/study unless --output says otherwise; with --report-only, the
report of the runs that are finished. Seeds 0 to 5 were used to choose the settings: they are no evidence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a rank of a distributed job leaves the process instead.

    No traceback is shown for what the user can mend (``TempoError``), for Ctrl-C and for a rank whose peers
    are gone.
    """
    place: RankInfo | None = None
    words = sys.argv[1:] if argv is None else argv
    command = words[0] if words else None
    try:
        try:
            arguments = _parse(words)
            place = rank_from_environment()
            follow_launcher(is_rank=place is not None)
            if place is not None:
                signal.signal(signal.SIGINT, _interrupt_once)
                _begin(place, command)
            code: int = arguments.run(arguments, place)
        except SystemExit as error:  # argparse: --help, --version (0) or bad usage (2)
            code = error.code if isinstance(error.code, int) else 1
        except Exception as error:
            code = tell(error, place)
    except KeyboardInterrupt:
        if _tells_of_signals(place):
            say(stop_message(signal.SIGINT, command))
        code = 128 + signal.SIGINT
    if place is not None:
        _leave(code)
    return code


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; ``key=value`` may stand behind options, too, where argparse itself takes no more of them."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in arguments or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    arguments.words = list(argv)
    return arguments


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="tempo-megatron",
        description="Test-time training of reasoning models by Expectation-Maximisation, on Megatron-Core and vLLM.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"tempo-megatron {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run one stage", description=TRAIN_HELP, formatter_class=raw)
    train.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/")
    train.add_argument("--dry-run", action="store_true", help="check all that needs no model, show the settings, end")
    add_scaled_arguments(train)
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate", help="accuracy, coverage, calibration of a model", description=EVALUATE_HELP, formatter_class=raw
    )
    evaluate.add_argument("model", metavar="MODEL", help="HF folder, checkpoint or run folder")
    evaluate.add_argument("--config", metavar="FILE", help="YAML file; default: config.yaml of MODEL's run")
    evaluate.add_argument("--set", action="append", default=[], metavar="NAME=FILE[,FILE]", help="instead of its sets")
    evaluate.add_argument("--trained-on", action="append", default=[], metavar="NAME", help="a set shown apart")
    evaluate.add_argument("--samples", type=int, metavar="N", help="responses to each prompt of every set")
    evaluate.add_argument("--critic", metavar="PATH", help="HF folder, checkpoint or run folder; none: without")
    evaluate.add_argument("--compare", type=Path, metavar="FILE", help="an evaluation.json: differences from it")
    evaluate.add_argument("--output", metavar="DIR", help="default: RUN/evaluation, or runs/evaluation/MODEL")
    evaluate.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that win over the file"
    )
    evaluate.set_defaults(run=_evaluate)

    examine = commands.add_parser(
        "doctor",
        help="what a machine, a job and a config lack; why vLLM and Megatron do not agree",
        description=doctor.HELP + DOCTOR_HELP,
        formatter_class=raw,
    )
    examine.add_argument("--mismatch", metavar="RUN", help="run folder, checkpoint or HF folder")
    examine.add_argument("--config", metavar="FILE", help="YAML file; with --mismatch by default RUN's config.yaml")
    examine.add_argument("--json", type=Path, metavar="FILE", help="without --mismatch: all that was found")
    examine.add_argument(
        "--set", action="append", default=[], metavar="NAME=FILE[,FILE]", help="prompts, not its sets'"
    )
    examine.add_argument("--prompts", type=int, metavar="N", help="to sample twice each; default: 8")
    examine.add_argument("--tokens", type=int, metavar="N", help="of a response at most; default: 64")
    examine.add_argument("--output", type=Path, metavar="DIR", help="for doctor-mismatch.json; default: only the table")
    examine.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that win over the file"
    )
    examine.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="data, sft, rlvr and tempo on a toy task (or a small real model)")
    demo.add_argument("--seed", type=int, metavar="N", help="default: 0")
    demo.add_argument("--real", action="store_true", help="SmolLM2-135M-Instruct on arithmetic, not the toy task")
    demo.add_argument("--output", type=Path, metavar="DIR", help="default: runs/demo, with --real runs/demo-real")
    demo.add_argument("--nproc", type=int, metavar="N", help="ranks; default: 2")
    part = demo.add_mutually_exclusive_group()
    part.add_argument("--prepare-only", action="store_true", help="write data and model; train by another launch")
    part.add_argument("--report-only", action="store_true", help="table and report of stages that were run")
    study = demo.add_argument_group("study", STUDY_HELP)
    study.add_argument("--study", action="store_true", help="several methods and seeds; goes on where it was stopped")
    study.add_argument(
        "--part", metavar="NAME", help="claims (default), guard, ablations, recalibration, precision or all"
    )
    study.add_argument("--seeds", metavar="N,N,...", help="default: 11, 12, ... one more than the part asks for")
    study.add_argument("--jobs", type=int, metavar="N", help="runs at a time, a rank each; default: 2")
    demo.set_defaults(run=_demo)

    convert = commands.add_parser("convert", help="HF folders to Megatron checkpoints and back, without training")
    convert.add_argument("direction", choices=("hf-to-megatron", "megatron-to-hf"))
    convert.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="--help lists those of a direction")
    convert.set_defaults(run=_convert)

    sync = commands.add_parser(
        "sync-plan", help="bytes that an update of the rollout's weights moves, by rank", description=SYNC_HELP
    )
    sync.add_argument("--hf", type=Path, required=True, metavar="DIR", help="folder with the policy's config.json")
    sync.add_argument("--ranks", type=int, required=True, metavar="N", help="of the job")
    sync.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="default: 8")
    for flag, what in SYNC_SIZES.items():
        sync.add_argument(f"--{flag}", type=int, default=1, metavar="N", help=f"{what}; default: 1")
    sync.add_argument("--rollout-ep", action="store_true", help="ranks of a vLLM replica have whole experts")
    sync.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="vLLM's; default: bfloat16")
    sync.add_argument("--bucket-mib", type=int, default=64, metavar="N", help="rollout.bucket_mib; default: 64")
    sync.add_argument("--json", type=Path, metavar="FILE", help="every rank and every link")
    sync.set_defaults(run=_sync_plan)

    plan = commands.add_parser(
        "plan", help="memory, work and time of a job, before it is started", description=PLAN_HELP, formatter_class=raw
    )
    plan_arguments(plan)
    plan.set_defaults(run=_plan)

    data = commands.add_parser("data", help="public data sets to prompt parquet; overlap between sets; made tasks")
    data_arguments(data)
    data.set_defaults(run=_data)

    submit = commands.add_parser("submit", help="train a chain of stages, or evaluate models, as Slurm jobs")
    submit_arguments(submit)
    submit.set_defaults(run=lambda arguments, _: run_submit(arguments))

    report = commands.add_parser("report", help="curves and tables of one or several runs as one HTML file")
    report.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    report.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the last RUN_DIR")
    report.set_defaults(run=_report)
    return parser


# ---------------------------------------------------------------- commands


def _train(arguments: argparse.Namespace, place: RankInfo | None) -> int:
    from tempo_megatron.config.check import check_config
    from tempo_megatron.config.load import load_config
    from tempo_megatron.telemetry.finished import finished_message
    from tempo_megatron.telemetry.progress import run_title

    config = load_config(arguments.config, arguments.overrides)
    if (job := scaled_job(arguments)) is not None:
        return _dry_run_at_scale(config, place, job)
    world_size = place.world_size if place else config.launch.nproc_per_node
    check_config(config, world_size)
    if arguments.dry_run:
        return _dry_run(config, place, world_size)
    if (done := finished_message(config)) is not None:
        if place is None or place.rank == 0:
            say(done)
        return 0
    check_limits()
    from tempo_megatron.planner.refuse import refuse_what_cannot_fit

    refuse_what_cannot_fit(config, world_size, world_size if place is None else ranks_of_node())
    _check_node(config, place)
    _set_environment(config)
    save_signal = stop_request.signal_of(config.launch.save_signal)
    if place is None and world_size > 1:
        check_unclaimed(Path(config.output_dir))  # told before ranks are started; rank 0 claims it
        say(f"{run_title(config.stage, config.output_dir)} starting {world_size} ranks on this node")
        from tempo_megatron.loop import load_libraries

        words = ["train", "--config", arguments.config, *arguments.overrides]
        return spawn_ranks(world_size, words, partial(load_libraries, config), save_signal)
    if place is None:
        _begin(place, "train")
    stop_request.save_and_end_on(save_signal, say if _tells_of_signals(place) else lambda _: None)
    from tempo_megatron.loop import run

    return EXIT_STOPPED if run(config) else 0


def _set_environment(config: Config) -> None:
    """Of this process and of ranks that it starts, before torch is imported."""
    launch = config.launch
    os.environ.update(rank_environment(launch.threads_per_rank, deterministic=launch.deterministic))


def _check_node(config: Config, place: RankInfo | None) -> None:
    """By one process of each node, before ranks are started."""
    if not is_spawned() and (place is None or place.local_rank == 0):
        check_start(Path(config.output_dir), config.launch.nproc_per_node if place is None else ranks_of_node())


def _dry_run(config: Config, place: RankInfo | None, world_size: int) -> int:
    if place is not None and place.world_size > 1:
        raise TempoError(
            "command line: --dry-run is one process and no rank; launch.nproc_per_node=N gives the ranks of the job"
        )
    from tempo_megatron.loop import run_dry

    run_dry(config, world_size)
    return 0


def _dry_run_at_scale(config: Config, place: RankInfo | None, job: ScaledJob) -> int:
    if place is not None and place.world_size > 1:
        raise TempoError(f"train --dry-run --nodes: runs as one process, not as one of {place.world_size} ranks")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what it builds has no numbers, on a machine with GPUs too
    _set_environment(config)
    from tempo_megatron.loop import run_dry_at_scale

    run_dry_at_scale(config, job)
    return 0


def _evaluate(arguments: argparse.Namespace, place: RankInfo | None) -> int:
    from tempo_megatron.config.check import check_evaluation
    from tempo_megatron.config.evaluation import EvaluationRequest, evaluation_config
    from tempo_megatron.locate import resolve_init

    config = evaluation_config(
        EvaluationRequest(
            model=arguments.model,
            config_file=arguments.config,
            critic=arguments.critic,
            sets=arguments.set,
            trained_on=arguments.trained_on,
            samples=arguments.samples,
            output=arguments.output,
            overrides=arguments.overrides,
        )
    )
    world_size = place.world_size if place else config.launch.nproc_per_node
    check_evaluation(config, world_size)
    check_limits()
    _set_environment(config)
    from tempo_megatron.evaluation.record import check_output, read_evaluation

    check_output(Path(config.output_dir), resolve_init(config.actor.init, "actor.init").path, arguments.compare)
    if arguments.compare is not None:
        read_evaluation(arguments.compare)  # what is wrong with it is told before the models are loaded
    _check_node(config, place)
    if place is None and world_size > 1:
        check_unclaimed(Path(config.output_dir))
        from tempo_megatron.loop import load_evaluation_libraries

        return spawn_ranks(world_size, arguments.words, load_evaluation_libraries)
    if place is None:
        _begin(place, "evaluate")
    from tempo_megatron.loop import run_evaluation

    run_evaluation(config, arguments.compare)
    return 0


def _doctor(arguments: argparse.Namespace, place: RankInfo | None) -> int:
    from tempo_megatron.config.check import check_mismatch
    from tempo_megatron.config.evaluation import NO_CRITIC, EvaluationRequest, evaluation_config

    doctor.check_arguments(arguments)
    if arguments.mismatch is None:
        return doctor.run_doctor(arguments, place)
    prompts, tokens = (doctor.positive(arguments, option) for option in ("prompts", "tokens"))
    config = evaluation_config(
        EvaluationRequest(
            model=arguments.mismatch,
            config_file=arguments.config,
            critic=NO_CRITIC,
            sets=arguments.set,
            output=None if arguments.output is None else str(arguments.output),
            overrides=arguments.overrides,
            name="--mismatch",
        )
    )
    world_size = place.world_size if place else config.launch.nproc_per_node
    check_mismatch(config, world_size)
    check_limits()
    _set_environment(config)
    if place is None and world_size > 1:
        if arguments.output is not None:
            check_unclaimed(arguments.output)
        from tempo_megatron.loop import load_doctor_libraries

        return spawn_ranks(world_size, arguments.words, load_doctor_libraries)
    if place is None:
        _begin(place, "doctor")
    from tempo_megatron.loop import run_mismatch

    run_mismatch(config, prompts, tokens, arguments.output)
    return 0


def _demo(arguments: argparse.Namespace, place: RankInfo | None) -> int:
    if arguments.study:
        return _study(arguments)
    for option in ("part", "seeds", "jobs"):
        if getattr(arguments, option) is not None:
            raise TempoError(f"command line: --{option} belongs to --study")
    from tempo_megatron.demo.run import DEMO, REAL_DEMO, run_demo

    nproc = 2 if arguments.nproc is None else arguments.nproc
    if nproc < 1:
        raise TempoError(f"command line: --nproc {nproc} must be at least 1")
    return run_demo(
        REAL_DEMO if arguments.real else DEMO,
        seed=arguments.seed or 0,
        output=arguments.output,
        nproc=nproc,
        prepare=not arguments.report_only,
        train=not (arguments.prepare_only or arguments.report_only),
        report=not arguments.prepare_only,
    )


def _study(arguments: argparse.Namespace) -> int:
    from tempo_megatron.demo.study.command import run_study

    for option in ("--real", "--prepare-only", "--seed", "--nproc"):
        given = getattr(arguments, option[2:].replace("-", "_"))
        if given is not None and given is not False:  # --seed 0 is given
            raise TempoError(f"command line: {option} is not for --study, which has --seeds and --jobs")
    return run_study(
        part=arguments.part or "claims",
        seeds=arguments.seeds,
        output=arguments.output or Path("runs/study"),
        jobs=2 if arguments.jobs is None else arguments.jobs,
        report_only=arguments.report_only,
    )


def _convert(arguments: argparse.Namespace, place: RankInfo | None) -> int:
    from tempo_megatron.checkpoint.convert.command import hf_to_megatron, megatron_to_hf

    if place is not None and place.world_size > 1:
        raise TempoError(f"convert: runs as one process, not as one of {place.world_size} ranks")
    return (hf_to_megatron if arguments.direction == "hf-to-megatron" else megatron_to_hf)(arguments.options)


def _sync_plan(arguments: argparse.Namespace, place: RankInfo | None) -> int:
    if place is not None and place.world_size > 1:
        raise TempoError(f"sync-plan: runs as one process, not as one of {place.world_size} ranks")
    for flag in ("ranks", "ranks_per_node", "bucket_mib", *(f.replace("-", "_") for f in SYNC_SIZES)):
        if getattr(arguments, flag) < 1:
            raise TempoError(f"command line: --{flag.replace('_', '-')} {getattr(arguments, flag)} must be at least 1")
    from tempo_megatron.config.schema import ParallelConfig
    from tempo_megatron.loop.sync_plan import SyncRequest, show_sync_plan

    layout = ParallelConfig(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        virtual_pipeline_model_parallel_size=arguments.vpp,
        context_parallel_size=arguments.cp,
        expert_model_parallel_size=arguments.ep,
        expert_tensor_parallel_size=arguments.etp,
        sequence_parallel=arguments.tp > 1,
    )
    request = SyncRequest(
        hf_dir=arguments.hf,
        layout=layout,
        ranks=arguments.ranks,
        ranks_per_node=arguments.ranks_per_node,
        rollout_size=arguments.rollout_tp,
        expert_parallel=arguments.rollout_ep,
        dtype=arguments.dtype,
        bucket_mib=arguments.bucket_mib,
    )
    show_sync_plan(request, arguments.json)
    return 0


def _plan(arguments: argparse.Namespace, place: RankInfo | None) -> int:
    from tempo_megatron.planner.command import run as plan

    if place is not None and place.world_size > 1:
        raise TempoError(f"plan: runs as one process, not as one of {place.world_size} ranks")
    return plan(arguments)


def _data(arguments: argparse.Namespace, place: RankInfo | None) -> int:
    if place is not None and place.world_size > 1:
        raise TempoError(f"data: runs as one process, not as one of {place.world_size} ranks")
    code: int = arguments.action(arguments)
    return code


def _report(arguments: argparse.Namespace, place: RankInfo | None) -> int:
    from tempo_megatron.telemetry.report import main as report

    return report(run_dirs=arguments.run_dirs, output=arguments.output)


# ---------------------------------------------------------------- this process


def _begin(place: RankInfo | None, command: str | None) -> None:
    """What a process does that trains or evaluates, before anything heavy is imported."""
    use_own_temporary_folder()
    if command == "train":
        stop_request.remember_early()
    else:
        print_stacks_on_signal()
    end_on_signals(lambda number: stop_message(number, command) if _tells_of_signals(place) else None)


def _tells_of_signals(place: RankInfo | None) -> bool:
    """One process of a job does: the only one, the launcher of this program's ranks, or rank 0 of another's."""
    return place is None or (place.rank == 0 and not is_spawned())


def _interrupt_once(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C reaches a rank twice, from the terminal and from its launcher; the second must not end the farewell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _leave(code: int) -> NoReturn:
    """End the process now: the destructors of half-open process groups would wait for peers that are gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if code != 0:
        time.sleep(LAST_WORDS_S)
    os._exit(code)
