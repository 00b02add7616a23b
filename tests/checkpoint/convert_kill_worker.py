"""Run by test_convert_kill.py: conversions, each killed by SIGKILL before one of its file operations.

Argument: JSON of ``folder``, ``seed``, ``kills`` and ``commands`` (by name, each a function of ``checkpoint.convert``
and its arguments, in which ``{target}`` stands for a target). Of each command a whole conversion is made at
``FOLDER/NAME/0``, and one that is killed at ``FOLDER/NAME/1``, ``2``, ...: at random, the last one just before the
folder would have got its name. Prints JSON: by command, ``points`` (file operations that were done) and ``ends``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

from tempo_megatron.checkpoint.convert import command as convert
from tempo_megatron.parallel import cpu_shim

os.environ["CUDA_VISIBLE_DEVICES"] = ""
cpu_shim.install()

from tempo_megatron.checkpoint.convert import verify  # noqa: E402, F401  (imported once, for every child)

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}


def run(command: str, arguments: list[str], folder: Path, target: Path, kill_at: int | None) -> int:
    """A conversion in a child: how many file operations below ``folder`` came before the one that gave the target its
    name, or minus the signal that ended the child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = named = 0

        def hook(event: str, details: tuple[object, ...]) -> None:
            nonlocal count, named
            if event in EVENTS and str(folder) in str(details[0]):
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if event == "os.rename" and str(details[1]) == str(target):
                    named = count
                count += 1

        sys.addaudithook(hook)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        code = getattr(convert, command)([a.format(target=target) for a in arguments])
        os.write(writer, f"{named}".encode())
        os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    written = os.read(reader, 100).decode()
    os.close(reader)
    if code > 0:
        raise SystemExit(f"the conversion ended with {code}")
    return int(written) if code == 0 else code


def main() -> None:
    job = json.loads(sys.argv[1])
    told = {}
    for name, (command, arguments) in job["commands"].items():
        folder = Path(job["folder"]) / name
        folder.mkdir()

        named = run(command, arguments, folder, folder / "0", None)
        points = [*sorted(random.Random(job["seed"]).sample(range(named), job["kills"])), named]
        ends = [run(command, arguments, folder, folder / str(1 + i), point) for i, point in enumerate(points)]
        told[name] = {"points": points, "ends": ends}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
