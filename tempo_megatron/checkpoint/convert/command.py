"""The commands of ``tools/checkpoint_convert``: HF folder -> Megatron checkpoint and back.

Exit codes: 0 done; 2 bad input; 3 the conversion failed (a full disk, a verification that finds a difference);
130 Ctrl-C.  Nothing here loads torch before the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempo_megatron.config.schema import ParallelConfig
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.locate import hf_name, resolve_checkpoint

if TYPE_CHECKING:
    import torch

    from tempo_megatron.checkpoint.convert.to_megatron import OnBytes
    from tempo_megatron.checkpoint.convert.verify import Verification
    from tempo_megatron.model.hf_tensors import Role

DTYPES = ("float32", "bfloat16", "float16")
SHARD_GIB = 5.0

TO_MEGATRON = """Turn a Hugging Face folder into a checkpoint that `train` takes as actor.init or critic.init.

The checkpoint loads into any layout; --tp, --pp, --vpp and --ep only say how many files it is cut into and which.
`train` reads Hugging Face folders directly too: converting beforehand is worth it for models so large that every
rank reading the whole folder takes long.
"""

TO_HF = """Turn a checkpoint (of this program, converted or written by `train`) into a Hugging Face folder.

DIR is a checkpoint folder (it holds manifest.json) or the folder of a run (its newest checkpoint). A critic becomes
a ...ForTokenClassification model with one label, or a policy's folder with a v_head.
"""

COMMON_EPILOG = """The target appears when it is complete, or not at all. A tensor is in memory only while it is copied.
--verify compares the SHA-256 of every tensor, then the outputs of transformers' model and of Megatron's (float32, one
model in memory at a time) on a fixed prompt; a target that differs is not published (exit code 3).
"""


def hf_to_megatron(argv: Sequence[str] | None = None) -> int:
    """The command ``hf_to_megatron.py``; returns its exit code."""
    parser = _parser("hf_to_megatron.py", TO_MEGATRON)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face folder to read")
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="checkpoint to write (new)")
    for flag, what in (
        ("tp", "tensor-parallel ranks"),
        ("pp", "pipeline stages"),
        ("vpp", "chunks of layers per stage (interleaved)"),
        ("ep", "expert-parallel ranks"),
    ):
        parser.add_argument(f"--{flag}", type=int, default=1, metavar="N", help=f"{what}; default: 1")
    parser.add_argument("--critic", action="store_true", help="the folder is a critic (score.*), or becomes one")
    parser.add_argument("--init-head", action="store_true", help="make a fresh value head if the folder has none")
    _add_dtype_and_verify(parser)
    return _run(parser, argv, _convert_to_megatron)


def megatron_to_hf(argv: Sequence[str] | None = None) -> int:
    """The command ``megatron_to_hf.py``; returns its exit code."""
    parser = _parser("megatron_to_hf.py", TO_HF)
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="checkpoint or run folder to read")
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face folder to write (new)")
    parser.add_argument("--critic", action="store_true", help="take the critic, not the actor")
    parser.add_argument(
        "--head",
        choices=("score", "v_head"),
        help="form of a critic: transformers' or TRL's; default: as it came, else score if transformers can read it",
    )
    parser.add_argument(
        "--shard-gib", type=float, default=SHARD_GIB, metavar="G", help=f"largest file, GiB; default: {SHARD_GIB:g}"
    )
    _add_dtype_and_verify(parser)
    return _run(parser, argv, _convert_to_hf)


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=name, description=description, epilog=COMMON_EPILOG, formatter_class=raw)


def _add_dtype_and_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="of every tensor; default: each keeps its own")
    parser.add_argument("--verify", action="store_true", help="compare tensors and forward outputs before publishing")


def _run(parser: argparse.ArgumentParser, argv: Sequence[str] | None, convert: Callable[[Any], None]) -> int:
    """What a user can mend is told in one line."""
    try:
        arguments = parser.parse_args(argv)
        for flag in ("init_head", "head"):
            if not arguments.critic and getattr(arguments, flag, None):
                raise TempoError(f"--{flag.replace('_', '-')} is for critics: add --critic")
        _stay_on_cpu()
        convert(arguments)
    except SystemExit as error:  # argparse: --help (0) or bad usage (2)
        return error.code if isinstance(error.code, int) else 1
    except TempoError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _stay_on_cpu() -> None:
    """Only bytes are moved; and GPUs of the machine may belong to others."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from tempo_megatron.parallel import cpu_shim

    cpu_shim.install()  # before anything imports megatron.core


# ---------------------------------------------------------------- HF -> Megatron


def _convert_to_megatron(arguments: argparse.Namespace) -> None:
    from tempo_megatron.checkpoint.convert.plan import world_size_of
    from tempo_megatron.checkpoint.convert.to_megatron import HFSource, describe, write_checkpoint
    from tempo_megatron.checkpoint.convert.verify import verify_megatron
    from tempo_megatron.checkpoint.hf_read import load_hf_config
    from tempo_megatron.config.layout import check_layout, read_model_shape
    from tempo_megatron.config.schema import CriticConfig

    role: Role = "critic" if arguments.critic else "actor"
    layout = _layout(arguments)
    with _target(arguments.megatron) as partial, _progress() as bar:
        config = load_hf_config(arguments.hf)
        shape = read_model_shape(arguments.hf / "config.json", "--hf", critic=True)
        check_layout(shape, layout, "layout", world_size_of(layout))
        source = HFSource(arguments.hf, config, role, init_head=arguments.init_head, dtype=_dtype(arguments.dtype))
        began, size = time.monotonic(), source.total_bytes()
        head_bias = CriticConfig.model_fields["initial_value"].default
        written = write_checkpoint(source, partial, layout, head_bias, bar("converting", size))
        verified = verify_megatron(source, partial, bar("verifying", 2 * size)) if arguments.verify else None
        describe(source, partial, layout, written)
        os.replace(partial, arguments.megatron)
    _report(arguments.megatron, size, time.monotonic() - began, verified)


def _layout(arguments: argparse.Namespace) -> ParallelConfig:
    for flag in ("tp", "pp", "vpp", "ep"):
        if getattr(arguments, flag) < 1:
            raise TempoError(f"--{flag} {getattr(arguments, flag)} must be at least 1")
    if arguments.vpp > 1 and arguments.pp == 1:
        raise TempoError(f"--vpp {arguments.vpp} needs --pp above 1")
    return ParallelConfig(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        virtual_pipeline_model_parallel_size=arguments.vpp,
        expert_model_parallel_size=arguments.ep,
        sequence_parallel=arguments.tp > 1,  # moves no weight; experts under tensor parallelism are built with it only
    )


# ---------------------------------------------------------------- Megatron -> HF


def _convert_to_hf(arguments: argparse.Namespace) -> None:
    from tempo_megatron.checkpoint.convert.to_hf import MegatronSource, write_hf
    from tempo_megatron.checkpoint.convert.verify import verify_hf
    from tempo_megatron.checkpoint.hf_read import load_hf_config
    from tempo_megatron.checkpoint.manifest import find_whole, parts_of, read_manifest

    role: Role = "critic" if arguments.critic else "actor"
    if not arguments.shard_gib > 0:
        raise TempoError(f"--shard-gib {arguments.shard_gib:g} must be above 0")
    folder = resolve_checkpoint(str(arguments.megatron), "--megatron")
    manifest = read_manifest(folder)
    roles = manifest.roles
    if role not in roles:
        hint = "; add --critic" if roles == ["critic"] else ""
        raise TempoError(f"--megatron: {folder} holds no {role} (roles: {', '.join(roles)}){hint}")
    find_whole(folder, parts_of(role))
    hf_dir = folder / hf_name(role)
    verified: list[Verification] = []
    with _target(arguments.hf), _progress() as bar:
        source = MegatronSource(folder / role, load_hf_config(hf_dir), role, _dtype(arguments.dtype))
        began, size = time.monotonic(), source.total_bytes()

        def verify(written: Path) -> None:
            if arguments.verify:
                verified.append(verify_hf(source, written, bar("verifying", 2 * size)))

        shard_bytes = int(arguments.shard_gib * 2**30)
        head = arguments.head or manifest.head_format
        write_hf(source, arguments.hf, hf_dir, shard_bytes, bar("converting", size), verify, head)
    _report(arguments.hf, size, time.monotonic() - began, *verified)


# ---------------------------------------------------------------- what both share


@contextmanager
def _target(folder: Path) -> Iterator[Path]:
    """The hidden folder in which the target is made; it goes with any error, and with the next conversion.

    Raises TempoError if the target is there and not empty, RunError if it cannot be written.
    """
    from tempo_megatron.checkpoint.faults import one_line

    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise TempoError(f"{folder}: exists and is {'not empty' if folder.is_dir() else 'a file'}; give a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
        with one_line(RunError, f"{folder}: the conversion failed"):
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    dtype: torch.dtype | None = getattr(torch, name) if name else None
    return dtype


@contextmanager
def _progress() -> Iterator[Callable[[str, int], OnBytes]]:
    """Bars over bytes on stderr, one below the other: (what, total) -> the function that moves a new one."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def start(what: str, total: int) -> OnBytes:
            task = progress.add_task(what, total=total)
            return lambda done: progress.advance(task, done)

        yield start


def _report(target: Path, size: int, seconds: float, verified: Verification | None = None) -> None:
    if verified is not None:
        from rich.console import Console
        from rich.table import Table

        from tempo_megatron.checkpoint.convert.verify import TOLERANCE

        table = Table("verified", "result")
        table.add_row("tensors with equal SHA-256", str(verified.tensors))
        difference = f"difference {verified.difference:.1e} of the largest (tolerance {TOLERANCE:.0e})"
        new_head = "not compared: the value head is new"
        table.add_row("forward outputs", f"{verified.outputs}, {difference}" if verified.outputs else new_head)
        Console(width=100).print(table)
    print(f"{target}: {size / 2**30:.2f} GiB in {seconds:.1f} s")
