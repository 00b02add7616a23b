"""What the threads of a rank are at, written before a job that hangs is ended.

A rank writes its own stacks, and what torch's flight recorder holds of its last collectives. Of one that cannot, for it
is stopped or holds Python's lock, another rank on the same host writes what the kernel tells, and the stacks if a
signal brings them: ``faulthandler`` answers it without the lock, into a file in memory that any process of the same
user may read.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

from torch.distributed import Store

from tempo_megatron.parallel import device as dev

#: In the output folder.
STACKS = "stacks"
#: Upon it a rank writes its stacks into its file in memory.
STACK_SIGNAL = signal.SIGRTMIN + 8
#: Seconds that it has for that.
ANSWER_S = 1.0
#: Collectives of each rank that the flight recorder keeps.
RECORDED = 2000
#: Prefix of the flight recorder's files; torchfrtrace (which knows NCCL's only) is told it by --prefix.
RECORDER_FILES = "flight_recorder_rank_"

_MEMORY_FILE = "tempo-stacks"
#: Of a thread, in /proc: state, the kernel's function that it waits in, the system call and its arguments.
_FACTS = ("comm", "wchan", "syscall", "stat")


def stacks_folder(store: Store, rank: int, output_dir: Path | None) -> Path | None:
    """Where this start of a job writes its stacks, the same on every rank: ``output_dir/stacks/TIME``, in UTC."""
    if rank == 0:
        store.set("stacks", f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}")
    return None if output_dir is None else output_dir / STACKS / store.get("stacks").decode()


def set_flight_recorder(folder: Path | None) -> None:
    """Have torch record collectives, and NCCL write them to ``folder`` when one takes too long.

    Before any process group is made: torch reads the environment once. What is set there stays.
    The names are those of torch 2.11 and 2.13 (FlightRecorder.hpp, ProcessGroupNCCL.hpp).
    """
    settings = {"TORCH_FR_BUFFER_SIZE": str(RECORDED)}
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" in os.environ:  # the older name, which would lose against ours
        settings = {}
    if dev.use_cuda():
        settings["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
        if folder is not None and "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in os.environ:
            with suppress(OSError):  # told by whoever writes there next
                folder.mkdir(parents=True, exist_ok=True)
            settings["TORCH_FR_DUMP_TEMP_FILE"] = str(folder / RECORDER_FILES)
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def open_for_others() -> int:
    """Have ``STACK_SIGNAL`` write this process's stacks into a file in memory; its descriptor."""
    descriptor = os.memfd_create(_MEMORY_FILE)
    faulthandler.register(STACK_SIGNAL, file=descriptor, all_threads=True)
    return descriptor


def write_own(folder: Path, rank: int, phase: str) -> None:
    """This process's stacks to ``rank-N.txt``, its last collectives to ``flight_recorder_rank_N``. From any thread.

    Raises OSError where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{rank}.txt").open("w", encoding="utf-8") as file:
        file.write(_header(rank, socket.gethostname(), os.getpid(), phase))
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    with suppress(RuntimeError):  # of torch, where nothing was recorded
        (folder / f"{RECORDER_FILES}{rank}").write_bytes(_recorded())


def write_of_other(folder: Path, rank: int, pid: int, descriptor: int, phase: str) -> None:
    """What can be known of another rank on this host, to ``rank-N.txt``; nothing where there is such a file.

    Args:
        descriptor: of its file in memory.
    """
    proc = Path(f"/proc/{pid}")
    with suppress(OSError):  # it has ended, is another user's, or its file is there
        memory = proc / "fd" / str(descriptor)
        if _MEMORY_FILE not in os.readlink(memory):
            return  # another process has its number, or it is in another container
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{rank}.txt").open("x", encoding="utf-8") as file:
            file.write(_header(rank, socket.gethostname(), pid, phase))
            file.write("It did not write this itself. Its threads, as the kernel tells:\n")
            file.writelines(_native(proc))
            file.write("\nIts Python stacks, upon a signal:\n" + (_asked(pid, memory) or "none; it is stopped\n"))


def _asked(pid: int, memory: Path) -> str:
    os.kill(pid, STACK_SIGNAL)
    deadline = time.monotonic() + ANSWER_S
    while not (text := memory.read_text(errors="replace")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.1)  # it is written piece by piece
    return memory.read_text(errors="replace") or text


def _native(proc: Path) -> list[str]:
    lines = []
    for task in sorted((proc / "task").iterdir(), key=lambda path: int(path.name)):
        facts = {}
        for name in _FACTS:
            try:
                facts[name] = (task / name).read_text().strip()
            except OSError:  # a matter of rights
                facts[name] = "?"
        fields = facts.pop("stat").rpartition(")")[2].split()
        state, ticks = (fields[0], f"user {fields[11]}, system {fields[12]} ticks") if fields else ("?", "?")
        lines.append(f"  thread {task.name} {facts['comm']}: state {state}, {ticks}, in {facts['wchan'] or '?'}, "
                     f"syscall {facts['syscall']}\n")  # fmt: skip
    return lines


def _header(rank: int, host: str, pid: int, phase: str) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return f"rank {rank}, host {host}, process {pid}, {phase}; {now}\n\n"


def _recorded() -> bytes:
    from torch._C import _distributed_c10d as c10d

    dump = c10d._dump_nccl_trace if hasattr(c10d, "_dump_nccl_trace") else c10d._dump_fr_trace  # type: ignore[attr-defined]
    recorded: bytes = dump()
    return recorded
