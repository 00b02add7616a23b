from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tempo_megatron.config.schema import VerifierConfig
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.verifiers import Clustered, Verdict, cluster_answers, worker
from tempo_megatron.verifiers.pool import InterruptedPoolError
from tempo_megatron.verifiers.registry import kind_named
from tempo_megatron.verifiers.service import VerifierService

ROOT = Path(__file__).parents[2]
BOXED = r"\boxed{1}"
LONG = "-".join(f"x^{{-x^{{-{i}}}}}" for i in range(10, 32))  # 0.8 s of the parser's time
SLOW, SHORT_S = rf"\boxed{{{LONG}}}", 0.2


def write_eval(path: Path, kind: str = "int") -> Path:
    columns = {
        "id": ["q1", "q2"],
        "source": ["s", "s"],
        "prompt": ["1+1", "6*7"],
        "answer": ["2", "42"],
        "answer_type": [kind, kind],
    }
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def eval_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_eval(tmp_path_factory.mktemp("service") / "eval.parquet")


@pytest.fixture(scope="module")
def service(eval_file: Path) -> Iterator[VerifierService]:
    with VerifierService({"arith": [str(eval_file)]}, VerifierConfig(workers=2, timeout_s=20)) as running:
        yield running


def worker_pid(service: VerifierService) -> int:
    service.ready()
    return service.worker_pids[0]


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
    pid = worker_pid(service)
    with pytest.raises(TempoError, match="unknown source 'geometry'; known: arith"):
        service.score_records("geometry", [("q1", "2")])
    with pytest.raises(TempoError, match="source 'arith' has no record 'q9'"):
        service.score_records("arith", [("q9", "2")])
    with pytest.raises(TempoError, match="unknown answer_type 'maths'"):
        service.score([("1", "1", "maths")])
    assert service.score([("1", "1", "int")])[0].correct
    assert worker_pid(service) == pid


def test_unusable_file_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(TempoError, match=r"nowhere\.parquet: no such file") as error:
        VerifierService({"a": [str(tmp_path / "nowhere.parquet")]}).ready()
    assert not isinstance(error.value, RunError)


def test_a_check_out_of_time_leaves_one_response_unverified() -> None:
    with VerifierService({}, VerifierConfig(workers=1, timeout_s=SHORT_S)) as service:
        items = [("1", "1", "int"), ("2", "1", "int"), (SLOW, "1", "math"), ("3", "3", "int"), (BOXED, "1", "math")]
        verdicts = service.score(items)
        assert [v.correct for v in verdicts] == [True, False, False, True, True]
        assert [v.verified for v in verdicts] == [True, True, False, True, True]
        assert verdicts[2].reason == "timeout: took more than 0.2 s"
        assert service.failures == {"timeout": 1}
        assert service.restarts == 1


def test_a_stopped_worker_is_killed_and_its_items_are_checked_again(eval_file: Path) -> None:
    with VerifierService({"arith": [str(eval_file)]}, VerifierConfig(workers=1, timeout_s=0.5)) as service:
        pid = worker_pid(service)
        os.kill(pid, signal.SIGSTOP)  # as good as code that can't be interrupted
        verdicts = service.score_records("arith", [("q1", "2"), ("q2", "x" * 10**6)])  # more than the pipe holds
        assert [v.correct for v in verdicts] == [True, False]
        assert all(v.verified for v in verdicts)
        assert not is_alive(pid)
        assert (service.restarts, service.failures) == (1, {})


def test_a_killed_worker_is_replaced_unnoticed(service: VerifierService) -> None:
    before, pid = service.restarts, worker_pid(service)
    os.kill(pid, signal.SIGKILL)
    assert wait_until_dead(pid)
    assert [v.correct for v in service.score([("1", "1", "int")] * 3)] == [True] * 3
    assert service.restarts == before + 1


def test_a_worker_killed_at_work_loses_nothing(service: VerifierService) -> None:
    items = [(str(i), "7", "int") for i in range(20_000)]
    killer = threading.Timer(0.1, os.kill, (worker_pid(service), signal.SIGKILL))
    killer.start()
    verdicts = service.score(items)
    killer.join()
    assert [i for i, v in enumerate(verdicts) if v.correct] == [7]
    assert all(v.verified for v in verdicts)


def test_an_item_that_kills_its_workers_is_given_up() -> None:
    with VerifierService({}, VerifierConfig(workers=1, memory_limit_mib=512)) as service:
        items = [("1", "1", "int"), ("x" * 150 * 2**20, "1", "int"), ("2", "2", "int")]
        verdicts = service.score(items)
        assert [v.correct for v in verdicts] == [True, False, True]
        assert [v.verified for v in verdicts] == [True, False, True]
        assert verdicts[1].reason.startswith("memory: needs more than")
        assert service.failures == {"memory": 1}
        assert service.restarts >= 2


def test_a_bug_in_a_library_is_counted_and_told(service: VerifierService, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_response: str, _answer: str) -> Verdict:
        raise RecursionError("deep")

    kind = dataclasses.replace(kind_named("int"), grade=broken)
    monkeypatch.setattr(worker, "verify", lambda response, answer, _: kind.grade(response, answer))
    reply = worker._reply("verify", ["1", "1", "int"], {}, VerifierConfig())
    assert reply == {"failure": "error", "reason": "error: RecursionError: deep"}


def test_clusters_as_in_process(service: VerifierService) -> None:
    boxes = ["1/2", "0.5", r"\frac{\sqrt{4}}{4}", "", "3", r"\sqrt{9}", "x+1", "1+x", r"5\text{ cm}", "5"]
    responses = [rf"\boxed{{{b}}}" for b in boxes] + ["no box"]
    ints = ["1", "2", "01", "one", "2"]
    math, whole, empty = service.cluster([("math", responses), ("int", ints), ("math", [])])
    extracted = [kind_named("math").extract(r) for r in responses]
    assert [c.extracted for c in math] == extracted
    assert [c.cluster for c in math] == cluster_answers(extracted, "math") == [0, 0, 0, None, 1, 1, 2, 2, 3, 3, None]
    assert whole == [Clustered(0, "1"), Clustered(1, "2"), Clustered(0, "1"), Clustered(None, None), Clustered(1, "2")]
    assert empty == []


def test_a_comparison_out_of_time_is_unreadable() -> None:
    with VerifierService({}, VerifierConfig(workers=1, timeout_s=SHORT_S)) as service:
        [group] = service.cluster([("math", [r"\boxed{\sqrt{9}}", SLOW, r"\boxed{3}"])])
        assert [c.cluster for c in group] == [0, None, 0]
        assert service.failures == {"timeout": 1}


@pytest.mark.parametrize(
    ("bad", "clusters", "failures"),
    [("|x|" * 70, [0, 1, 1, 2, 3], 0), (LONG, [None, 0, 0, 1, 2], 1)],  # refused by the parser; out of time
)
def test_one_response_does_not_cost_the_others_their_clusters(
    bad: str, clusters: list[int | None], failures: int
) -> None:
    boxes = [bad, r"\sqrt{2}", "2^{1/2}", r"\sqrt{3}", "7"]
    with VerifierService({}, VerifierConfig(workers=1, timeout_s=SHORT_S)) as service:
        [group] = service.cluster([("math", [rf"\boxed{{{b}}}" for b in boxes])])
        assert [c.cluster for c in group] == clusters
        assert service.failures.total() == failures


def test_a_judge_must_be_configured(service: VerifierService, tmp_path: Path) -> None:
    with pytest.raises(TempoError, match=r"needs verifier\.judge\.base_url and verifier\.judge\.model"):
        service.score([("x", "x", "judge")])
    judged = write_eval(tmp_path / "judged.parquet", kind="judge")
    with pytest.raises(TempoError, match=r"needs verifier\.judge\.base_url"):
        VerifierService({"free": [str(judged)]}).ready()


@given(st.lists(st.text(alphabet=r"\{}frac1 2sqtx+-^_()[],=<>.!%", max_size=40), min_size=8, max_size=8))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_box_has_a_verdict_in_time(service: VerifierService, boxes: list[str]) -> None:
    before = service.failures.copy()
    verdicts = service.score([(rf"\boxed{{{box}}}", r"\frac{1}{2}", "math") for box in boxes])
    assert len(verdicts) == 8
    assert service.failures == before


def test_closed_service_has_no_process_and_refuses() -> None:
    service = VerifierService({})
    pid = worker_pid(service)
    service.close()
    assert not is_alive(pid)
    with pytest.raises(ValueError, match="closed"):
        service.score([("1", "1", "int")])


def test_what_is_asked_meanwhile_is_asked_together_and_answered_apart(service: VerifierService) -> None:
    scored = [service.score_later([(str(i), "7", "int"), ("7", "7", "int")]) for i in range(40)]
    of_records = service.score_records_later("arith", [("q2", "42")])
    clustered = [service.cluster_later([("int", [str(i), "3", "no"])]) for i in range(5)]
    wrong = service.score_later([("1", "1", "maths")])
    assert [[v.correct for v in s.result()] for s in scored] == [[i == 7, True] for i in range(40)]
    assert of_records.result()[0].correct
    assert [[c.cluster for c in group] for f in clustered for group in f.result()] == [
        [0, int(i != 3), None] for i in range(5)
    ]
    with pytest.raises(TempoError, match="unknown answer_type 'maths'"):
        wrong.result()


def test_closing_waits_for_nothing() -> None:
    with VerifierService({}, VerifierConfig(workers=1, timeout_s=100)) as service:
        pid = worker_pid(service)
        reply = service.score_later([(SLOW, "1", "math")] * 200)
    assert not is_alive(pid)
    with pytest.raises(InterruptedPoolError):
        reply.result()
    starting = VerifierService({})
    starting.close()
    assert starting.worker_pids == []


def run_module(folder: Path, body: str, *arguments: str) -> subprocess.Popen[str]:
    """``python -m app`` with ``body`` as its main function."""
    package = folder / "app"
    package.mkdir()
    main = f"""
import sys, time
from tempo_megatron.data.isolated import read_prompts_isolated
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
    print(service.score_records("arith", [("q2", "42")])[0].correct, service.worker_pids[0])
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
    service.ready()
    print(service.worker_pids[0], flush=True)
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
