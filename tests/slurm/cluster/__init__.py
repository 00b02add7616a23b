"""A real Slurm cluster on this host: munged, slurmctld and one slurmd a node, on loopback, as root.

All state is in one temporary folder.  Every daemon is tied to the life of this process: the cluster ends with
it, however it ends.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: States of ``scontrol show job`` that a job does not leave any more.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
#: One prefix for what must die with us: SIGKILL upon the death of the thread that started it.
TIED = ("setpriv", "--pdeathsig", "KILL", "--")


class SlurmCluster:
    """Context manager: ``with SlurmCluster(nodes=2) as cluster: cluster.sbatch(script)``.

    Nodes are called node1, node2, ...; each claims ``cpus_per_node`` CPUs and ``gpus_per_node`` GPUs of type
    h100 (links to /dev/null), whatever the host has.

    Attributes:
        env: environment of Slurm's client commands and, through sbatch, of the jobs: this process's, with
            SLURM_CONF set and this interpreter's folder first on PATH.
    """

    def __init__(self, nodes: int = 2, cpus_per_node: int = 16, gpus_per_node: int = 8) -> None:
        self.nodes = nodes
        self._cpus = cpus_per_node
        self._gpus = gpus_per_node
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # short, since it holds unix sockets; open to all, since munge insists
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self.env = {**inherited, "PATH": path, "SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    def __enter__(self) -> SlurmCluster:
        try:
            self._write_files()
            self._start_daemons()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Standard output of one of Slurm's commands; AssertionError with its standard error when it fails."""
        environment = {**self.env, **(env or {})}
        done = subprocess.run(
            list(map(str, command)), env=environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise AssertionError(f"{command} ended with {done.returncode}: {done.stderr}\n{self.logs()}")
        return done.stdout

    def sbatch(
        self,
        script: str | Path,
        *arguments: str,
        options: Sequence[str] = (),
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """Submit ``script ARGUMENTS`` with sbatch's ``options`` from folder ``cwd``; ``env`` is added to the job's.

        Returns the job id.
        """
        return int(self.run("sbatch", "--parsable", *options, script, *arguments, cwd=cwd, env=env).split(";")[0])

    def job(self, job_id: int | str) -> dict[str, str]:
        """The fields of ``scontrol show job``, such as JobState, ExitCode, StdOut; ``ARRAY_ELEMENT`` is a job too."""
        fields = self.run("scontrol", "-o", "show", "job", str(job_id)).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def state(self, job_id: int | str) -> str:
        return self.job(job_id)["JobState"]

    def output(self, job_id: int | str) -> str:
        """What the job has written to its output file so far; empty before it starts."""
        path = Path(self.job(job_id)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job_id: int | str, timeout_s: float) -> str:
        """The state in which the job ended; after ``timeout_s`` it is cancelled and AssertionError raised."""
        end = time.monotonic() + timeout_s
        while (state := self.state(job_id)) not in ENDED:
            if time.monotonic() > end:
                output = self.output(job_id)
                self.run("scancel", str(job_id))
                raise AssertionError(
                    f"job {job_id} still {state} after {timeout_s:g} s\n{output[-8000:]}\n{self.logs()}"
                )
            time.sleep(0.2)
        return state

    def until_said(self, job_id: int | str, text: str, timeout_s: float) -> None:
        """Until the job's output holds ``text``; AssertionError once it has ended or the time is up."""
        end = time.monotonic() + timeout_s
        while text not in self.output(job_id):
            if time.monotonic() > end or self.state(job_id) in ENDED:
                raise AssertionError(
                    f"job {job_id} ({self.state(job_id)}) has not said {text!r}\n{self.output(job_id)[-8000:]}"
                )
            time.sleep(0.2)

    def crash(self, node: str) -> None:
        """A power cut of one node: its slurmd and all of its processes are gone at once."""
        process = self._daemons.pop(node)
        process.kill()
        process.wait()

    def restart(self, node: str, timeout_s: float = 60) -> None:
        """Bring a crashed node back, once Slurm has found it gone: before, it would believe that its jobs still run."""
        self._until(lambda: "DOWN" in self._node_state(node), f"{node} is not down", timeout_s)
        self._start_node(node)
        self._until(lambda: self._node_state(node) == "IDLE", f"{node} is not idle", timeout_s)

    def _node_state(self, node: str) -> str:
        fields = self.run("scontrol", "-o", "show", "node", node).split()
        return next(field.partition("=")[2] for field in fields if field.startswith("State="))

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        paths = sorted((self.folder / "log").glob("*"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in paths)

    def stop(self) -> None:
        """End every daemon and every process of every job, and remove the folder; may be called twice."""
        for name, process in self._daemons.items():
            # killing a node's first process is a power cut: its slurmd, steps and tasks go at once
            process.send_signal(signal.SIGKILL if name.startswith("node") else signal.SIGTERM)
        for process in self._daemons.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._daemons.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_files(self) -> None:
        for name in ("etc", "run", "log", "state", "spool", "dev"):
            (self.folder / name).mkdir()
        etc = self.folder / "etc"
        first_port = _free_ports(self.nodes + 1)
        values = {
            "host": socket.gethostname().split(".")[0],
            "folder": self.folder,
            "controller_port": first_port,
            "first_job_id": random.SystemRandom().randrange(1, 60000),
            "names": f"node[1-{self.nodes}]",
            "addresses": f"127.0.77.[1-{self.nodes}]",
            "ports": f"[{first_port + 1}-{first_port + self.nodes}]",
            "cpus": self._cpus,
            "gpus": f"h100:{self._gpus}",
        }
        template = string.Template((HERE / "slurm.conf.in").read_text())
        (etc / "slurm.conf").write_text(template.substitute(values))
        # slurmd drops GPUs that have no device file
        for index in range(self._gpus):
            (self.folder / "dev" / f"gpu{index}").symlink_to("/dev/null")
        gpus = f"Name=gpu Type=h100 File={self.folder}/dev/gpu[0-{self._gpus - 1}]\n"
        (etc / "gres.conf").write_text("AutoDetect=off\n" + gpus)
        names = "".join(f"127.0.77.{n} node{n}\n" for n in range(1, self.nodes + 1))
        (etc / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        (etc / "munge.key").write_bytes(os.urandom(128))
        (etc / "munge.key").chmod(0o600)

    def _start_daemons(self) -> None:
        run, log = self.folder / "run", self.folder / "log"
        files = [f"--key-file={self.folder}/etc/munge.key", f"--socket={run}/munge.socket"]
        files += [f"--pid-file={run}/munged.pid", f"--seed-file={run}/munged.seed", f"--log-file={log}/munged.log"]
        self._start("munged", "munged", "--foreground", *files)
        self._until((run / "munge.socket").is_socket, "munged has no socket")
        self._start("slurmctld", "slurmctld", "-D", "-f", self.env["SLURM_CONF"])
        for n in range(1, self.nodes + 1):
            self._start_node(f"node{n}")
        self._until(lambda: self._idle_nodes() == self.nodes, "the nodes are not idle")

    def _start_node(self, name: str) -> None:
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        namespaces = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc")
        self._start(name, *namespaces, "bash", str(HERE / "node.sh"), name, str(self.folder / "etc" / "hosts"))

    def _idle_nodes(self) -> int:
        command = ["sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D"]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        return int(done.stdout) if done.returncode == 0 and done.stdout.strip() else 0

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [*TIED, *command],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _until(self, ready: Callable[[], bool], complaint: str, timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while not ready():
            ended = [name for name, process in self._daemons.items() if process.poll() is not None]
            if ended or time.monotonic() > end:
                raise AssertionError(f"{complaint}; ended: {ended}\n{self.logs()}")
            time.sleep(0.1)


def _free_ports(count: int) -> int:
    """The first of ``count`` consecutive TCP ports that nobody uses, below those that the kernel hands out."""
    blocks = list(range(10000, 19000, 50))
    random.SystemRandom().shuffle(blocks)  # clusters that start at the same time should not try the same ones
    for first in blocks:
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise AssertionError(f"no {count} free ports in a row between {blocks[0]} and {blocks[-1]}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
