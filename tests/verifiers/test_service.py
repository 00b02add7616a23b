from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.verifiers.service import VerifierService

ROOT = Path(__file__).parents[2]


def write_eval(path: Path) -> Path:
    columns = {
        "id": ["q1", "q2"],
        "source": ["s", "s"],
        "prompt": ["1+1", "6*7"],
        "answer": ["2", "42"],
        "answer_type": ["int", "int"],
    }
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def eval_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_eval(tmp_path_factory.mktemp("service") / "eval.parquet")


@pytest.fixture(scope="module")
def service(eval_file: Path) -> Iterator[VerifierService]:
    with VerifierService({"arith": [str(eval_file)]}, timeout_s=20) as running:
        yield running


def child_pid(service: VerifierService) -> int:
    assert service._child is not None
    pid = service._child[0].pid
    assert pid is not None
    return pid


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_dead(pid: int, limit_s: float = 10) -> bool:
    end = time.monotonic() + limit_s
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(pid)


def test_scores_in_order(service: VerifierService) -> None:
    verdicts = service.score([("500", "500", "int"), ("501", "500", "int"), ("c4;a2+", "c4|37=a2", "guess_check")])
    assert [v.correct for v in verdicts] == [True, False, True]
    assert verdicts[2].details == {"well_formed": 1.0, "honest": 1.0, "claims_correct": 1.0}
    assert service.score([]) == []


def test_scores_records_of_a_source(service: VerifierService) -> None:
    verdicts = service.score_records("arith", [("q2", r"\boxed{42}"), ("q1", "42"), ("q1", "2"), ("q1", "\ud800")])
    assert [v.correct for v in verdicts] == [True, False, True, False]


def test_user_errors_keep_the_child(service: VerifierService) -> None:
    pid = child_pid(service)
    with pytest.raises(TempoError, match="unknown source 'geometry'; known: arith"):
        service.score_records("geometry", [("q1", "2")])
    with pytest.raises(TempoError, match="source 'arith' has no record 'q9'"):
        service.score_records("arith", [("q9", "2")])
    with pytest.raises(TempoError, match="unknown answer_type 'maths'"):
        service.score([("1", "1", "maths")])
    assert service.score([("1", "1", "int")])[0].correct
    assert child_pid(service) == pid


def test_unusable_file_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(TempoError, match=r"nowhere\.parquet: no such file") as error:
        VerifierService({"a": [str(tmp_path / "nowhere.parquet")]})
    assert not isinstance(error.value, RunError)


def test_deadline_kills_and_the_next_call_starts_anew(eval_file: Path) -> None:
    with VerifierService({"arith": [str(eval_file)]}, timeout_s=0.5) as service:
        pid = child_pid(service)
        os.kill(pid, signal.SIGSTOP)  # as good as a verifier that never ends
        with pytest.raises(RunError, match=r"checking 2 responses of source 'arith' took more than 0\.5 s"):
            service.score_records("arith", [("q1", "2"), ("q2", "x" * 10**6)])  # more than the pipe holds
        assert not is_alive(pid)
        service._timeout_s = 20
        assert service.score_records("arith", [("q1", "2")])[0].correct


def test_dead_child_is_told_and_replaced(service: VerifierService) -> None:
    pid = child_pid(service)
    os.kill(pid, signal.SIGKILL)
    assert wait_until_dead(pid)
    with pytest.raises(RunError, match=r"its process died \(exit code -9; .* while checking 1 labeled responses"):
        service.score([("1", "1", "int")])
    assert service.score([("1", "1", "int")])[0].correct


def test_memory_is_bounded() -> None:
    with VerifierService({}) as unlimited:
        size_kib = int(Path(f"/proc/{child_pid(unlimited)}/status").read_text().split("VmPeak:")[1].split()[0])
    with VerifierService({}, memory_limit_mib=size_kib // 1024 + 16) as small:
        with pytest.raises(RunError, match=r"(limit|may use) \d+ MiB\) while checking 1 labeled responses"):
            small.score([("x" * 20 * 2**20, "1", "int")])
        assert small.score([("1", "1", "int")])[0].correct


def test_closed_service_has_no_process_and_refuses() -> None:
    service = VerifierService({})
    pid = child_pid(service)
    service.close()
    assert not is_alive(pid)
    with pytest.raises(ValueError, match="closed"):
        service.score([("1", "1", "int")])


def run_module(folder: Path, body: str, *arguments: str) -> subprocess.Popen[str]:
    """``python -m app`` with ``body`` as its main function."""
    package = folder / "app"
    package.mkdir()
    main = f"""
import sys, time
from tempo_megatron.data.prompts import read_prompts_isolated
from tempo_megatron.verifiers.service import VerifierService

def main(path):
{textwrap.indent(textwrap.dedent(body), "    ")}

if __name__ == "__main__":
    main(*sys.argv[1:])
"""
    (package / "__main__.py").write_text(main)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    command = [sys.executable, "-m", "app", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=folder)


def test_works_under_python_m_and_ends_with_it(tmp_path: Path, eval_file: Path) -> None:
    body = """
    service = VerifierService({"arith": [path]})
    print(service.score_records("arith", [("q2", "42")])[0].correct, service._child[0].pid)
    """
    process = run_module(tmp_path, body, str(eval_file))
    out, _ = process.communicate(timeout=60)
    correct, pid = out.split()
    assert process.returncode == 0
    assert correct == "True"
    assert wait_until_dead(int(pid))


def test_dies_with_a_killed_parent(tmp_path: Path, eval_file: Path) -> None:
    body = """
    service = VerifierService({"arith": [path]})
    print(service._child[0].pid, flush=True)
    time.sleep(60)
    """
    parent = run_module(tmp_path, body, str(eval_file))
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, signal.SIGSTOP)  # it can't notice the closed pipe
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_dead(pid)


def test_light_imports() -> None:
    code = """
import sys
import tempo_megatron.__main__, tempo_megatron.verifiers.service, tempo_megatron.data.sft, tempo_megatron.data.encode
print([m for m in ("torch", "transformers", "vllm", "megatron", "sympy") if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
