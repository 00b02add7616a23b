"""``doctor --mismatch`` on real engines, with one fault after the other put into one of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.folders import seal
from tests.launching import ROOT, launch_ranks
from tests.loop.conftest import DemoInputs

PROMPTS, TOKENS = 6, 20

#: Fault -> the cause that is to be found, what is said of it, and the side that is off.
FAULTS = {
    "trainer_temperature": ("temperature", r"at temperature 0\.8; the trainer has 1,", "trainer"),
    "rollout_temperature": ("temperature", r"at temperature 0\.7; the trainer has 1,", "rollout"),
    "prompts_without_first_token": ("position shift", "for prompts without their first token", "rollout"),
    "next_tokens_log_probs": ("position shift", "of a token are the trainer's of the next one", "rollout"),
    "growing_difference": ("kernel", "grows along the responses", "rollout"),
    "stale_weights": ("weights", "agree once the weights are sent again", "rollout"),
    "other_weights": ("weights", "as large at the first tokens as later", "rollout"),
}
#: Name of the model's copy whose tokenizer would put token 0 before a prompt -> the cause if vLLM does, what is said.
BEGINNINGS = {
    "bos": ("position shift", "for prompts with a beginning-of-sequence token"),
    "template": ("tokenizer", "for prompts encoded again, with special tokens"),
}
TRUNCATION = {"rollout.top_p": 0.8, "rollout.temperature": 0.9}


def write_with_beginning(model: Path, folder: Path, name: str) -> Path:
    """A copy of the model whose tokenizer has a beginning-of-sequence token, or a template of its own that adds one."""
    copy = folder / name
    shutil.copytree(model, copy)
    file, key, value = {
        "bos": ("tokenizer_config.json", "bos_token", "<pad>"),
        "template": (
            "tokenizer.json",
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<pad>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<pad>": {"id": "<pad>", "ids": [0], "tokens": ["<pad>"]}},
            },
        ),
    }[name]
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**content, key: value}))
    return copy


@pytest.fixture(scope="module")
def found(demo_inputs: DemoInputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """On an HF folder without a fault, with each of ``FAULTS``, and with top_p; on others; on a run of stage sft."""
    folder = tmp_path_factory.mktemp("doctor")
    settings = {
        "actor.dtype": "float32",
        "rollout.dtype": "float32",
        "rollout.max_num_seqs": 64,
        "data.max_prompt_tokens": 16,
        "data.max_response_tokens": 24,
        "launch.nproc_per_node": 1,
    }
    few = ["--prompts", str(PROMPTS), "--tokens", str(TOKENS)]
    prompts = ["--set", f"x={demo_inputs.data['eval_du']}", *few]
    model = ["doctor", "--mismatch", str(demo_inputs.model), *prompts]

    def case(name: str, words: list[str], changes: dict[str, Any], fault: str | None = None) -> dict[str, Any]:
        overrides = [f"{key}={value}" for key, value in {**settings, **changes}.items()]
        return {"name": name, "words": [*words, *overrides], "fault": fault}

    train = {
        "output_dir": folder / "run",
        "steps": 1,
        "actor.init": demo_inputs.model,
        "data.train_files": f"[{demo_inputs.data['sft']}]",
    }
    cases = [case("agree", [*model, "--output", str(folder / "out")], {})]
    cases += [case(fault, [*model, "--output", str(folder / fault)], {}, fault) for fault in FAULTS]
    for name in BEGINNINGS:
        copy = str(write_with_beginning(demo_inputs.model, folder, name))
        words = ["doctor", "--mismatch", copy, "--output", str(folder / f"{name}-out"), *prompts]
        cases.append(case(name, words, {}, "prompts_behind_token_0"))
    cases.append(case("truncation", model, TRUNCATION))
    cases.append(case("train", ["train", "--config", str(ROOT / "configs/demo/sft.yaml")], train))
    moves = {"residency.offload": "all", "residency.sleep": "true", "rollout.temperature": 0.5}
    examine = ["doctor", "--mismatch", str(folder / "run"), "--output", str(folder / "examined"), *few]
    cases.append(case("run", examine, moves))
    (folder / "cases.json").write_text(json.dumps(cases))
    files = folder / "cases.json", folder / "results.json"
    launch_ranks("tests.loop.doctor_worker", *files, nproc=1, timeout_s=150).check()
    return folder, json.loads((folder / "results.json").read_text())


def test_a_checkpoints_tokenizer_is_that_of_the_model_its_run_began_with(
    demo_inputs: DemoInputs, tmp_path: Path
) -> None:
    from tempo_megatron.locate import resolve_init
    from tempo_megatron.loop.doctor import changed_tokenizer_files

    checkpoint = tmp_path / "step_00000001"
    shutil.copytree(demo_inputs.model, checkpoint / "hf")

    def changed(init: object) -> list[str]:
        seal(checkpoint, config={"actor": {"init": str(init)}})
        return changed_tokenizer_files(resolve_init(str(checkpoint), "--mismatch"))

    assert changed(demo_inputs.model) == []
    (checkpoint / "hf" / "tokenizer_config.json").write_text("{}")
    (checkpoint / "hf" / "chat_template.jinja").unlink()
    (checkpoint / "hf" / "config.json").write_text("{}")  # the model's, not the tokenizer's
    assert changed(demo_inputs.model) == ["tokenizer_config.json", "chat_template.jinja"]
    assert changed(tmp_path / "gone") == []
    seal(checkpoint)  # converted: it knows of no run
    assert changed_tokenizer_files(resolve_init(str(checkpoint), "--mismatch")) == []
    assert changed_tokenizer_files(resolve_init(str(demo_inputs.model), "--mismatch")) == []


def written(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name / "doctor-mismatch.json").read_text())
    return found


@pytest.mark.slow(20)
@pytest.mark.timeout(200)
def test_engines_that_agree(found: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, results = found
    result, record = results["agree"], written(folder, "out")
    assert result["code"] == 0, result["stderr"]
    assert "no mismatch: vLLM's and Megatron's log-probabilities differ by" in result["stdout"]
    assert "error" not in result["stderr"]
    assert (record["cause"], record["side"], record["bound"], record["prompts"]) == (None, None, 1e-3, PROMPTS)
    assert record["temperature"] == pytest.approx(1.0, abs=1e-4)
    assert 0 < record["tokens"] <= PROMPTS * 2 * TOKENS
    by_cause: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        by_cause.setdefault(row["cause"], []).append(row)
    assert list(by_cause) == ["", "weights", "kernel", "temperature", "position shift", "tokenizer", "top_p"]
    assert by_cause[""][0]["mean_abs"] < 1e-5
    assert by_cause[""][0]["kl_k3"] < 1e-9 and by_cause[""][0]["ess"] > 1 - 1e-6
    assert [row["found"] for row in by_cause["kernel"][:2]] == ["agree", "agree"]
    assert by_cause["weights"][1]["found"] == "equal"
    assert all(row["mean_abs"] > 0.05 for row in by_cause["position shift"])


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(found: tuple[Path, dict[str, dict[str, Any]]], fault: str) -> None:
    folder, results = found
    cause, because, side = FAULTS[fault]
    result, record = results[fault], written(folder, fault)
    (told,) = [line for line in result["stderr"].splitlines() if line.startswith("error: ")]
    assert result["code"] == 3
    assert (record["cause"], record["side"]) == (cause, side), told
    assert told.startswith("error: mismatch: vLLM's and Megatron's log-probabilities differ by ")
    assert f"most likely {cause}: " in told
    assert re.search(because, told), told
    assert told.endswith({"trainer": "the trainer is off", "rollout": "vLLM is off"}[side])
    assert cause in result["stdout"]


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_token_before_the_prompt_is_found(found: tuple[Path, dict[str, dict[str, Any]]], name: str) -> None:
    folder, results = found
    cause, because = BEGINNINGS[name]
    record = written(folder, f"{name}-out")
    assert (results[name]["code"], record["cause"], record["side"]) == (3, cause, "rollout"), record["conclusion"]
    assert because in record["because"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_truncation_is_named_although_the_run_has_no_gate_with_it(
    found: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    result = found[1]["truncation"]
    assert result["code"] == 3
    assert "most likely top_p: " in result["stderr"]
    assert "with rollout.top_p 0.8 and rollout.top_k -1" in result["stderr"]
    assert "explains it" in result["stdout"]
    assert "at 100% of the tokens" in result["stdout"]
    assert "doctor-mismatch.json" not in result["stdout"]  # without --output


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_is_examined_with_its_settings_and_its_training_prompts(
    found: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    """Stage sft, whose own log-probabilities are at temperature 1; everything leaves the device between phases."""
    folder, results = found
    assert results["train"]["code"] == 0, results["train"]["stderr"]
    result = results["run"]
    assert result["code"] == 0, result["stderr"]
    assert "no mismatch" in result["stdout"]
    record = written(folder, "examined")
    assert (record["model"]["kind"], record["bound"], record["prompts"]) == ("checkpoint", 1e-4, PROMPTS)
    compared = {row["compared"]: row["found"] for row in record["rows"]}
    assert compared["Megatron and transformers in float32 (the trainer's weights)"] == "agree"
    assert compared["tensors of the trainer and of its folder"].startswith("skipped: ")
    assert not (folder / "run" / "evaluation").exists()
