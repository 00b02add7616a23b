"""The CUDA stack on a machine without a GPU: it imports, models are built of it, and what we assume of it is so.

Programs run with the interpreter of that environment; these tests run in any (``make test-cuda-env``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launching import LaunchResult
from tests.test_library_assumptions import READ, REPLACED

pytestmark = [pytest.mark.cuda_env, pytest.mark.slow(120)]

Run = Callable[..., LaunchResult]

#: What is replaced on a GPU and not on the CPU.
MORE_REPLACED = {
    "transformers.models.auto.auto_factory._LazyAutoMapping._extra_content",
    "vllm.model_executor.layers.fused_moe.expert_map_manager.ExpertMapManager.__init__",
    *(f"vllm.distributed.parallel_state.{name}" for name in ("_TP", "_EP", "_WORLD", "_PP", "_DP", "_PCP", "_DCP")),
}

V2 = "vllm.v1.worker.gpu"
#: As in ``test_library_assumptions.READ``, of what only a GPU comes to.
READ_THERE = [
    # rollout/engine.py: steps in flight
    ("vllm.v1.engine.core:EngineCore.step_with_batch_queue", "batch_queue"),
    ("vllm.v1.engine.core_client:InprocClient.get_output", "step_fn"),
    # a sample's seed is its own, whichever sampler runs
    (f"{V2}.sample.states:SamplingStates.add_request", "seed"),
    (f"{V2}.sample.sampler:Sampler.sample", "any_explicit_seed"),
    (f"{V2}.sample.sampler:Sampler.__call__", "PROCESSED_LOGPROBS_MODES"),
    # rollout/sleep.py
    (f"{V2}.model_runner:GPUModelRunner.initialize_kv_cache", "kv_caches"),
    ("vllm.v1.worker.gpu_worker:Worker.sleep", "suspend"),
    ("vllm.v1.worker.gpu_worker:Worker.wake_up", "weights"),
    # rollout/patches.py: this rank's place
    ("vllm.v1.executor.uniproc_executor:ExecutorWithExternalLauncher._distributed_args", "LOCAL_RANK"),
    # rollout/weights.py: what a module is told of its weights behind an update
    ("vllm.model_executor.model_loader.reload.layerwise:_layerwise_process", "process_weights_after_loading"),
]
#: Of the CPU's build or of its worker alone.
CPU_ALONE = ("cpu_worker", "cpu_communicator", "dispatch_cpu", "cpu_unquantized", "_setup_kernel", "_rebind_kernels")


def last_line(result: LaunchResult) -> Any:
    return json.loads(result.check().stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def models(run_there: Run) -> dict[str, dict[str, list[str]]]:
    return last_line(run_there("-m", "tests.cuda_env.te_worker"))


@pytest.fixture(scope="module")
def rollout(run_there: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return last_line(run_there("-m", "tests.cuda_env.vllm_worker", tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def patches(run_there: Run) -> dict[str, Any]:
    read = [pair for pair in READ if not any(word in ":".join(pair) for word in CPU_ALONE)]
    return last_line(run_there("-m", "tests.cuda_env.patches_worker", json.dumps([*read, *READ_THERE])))


def test_all_of_it_imports(run_there: Run) -> None:
    found = last_line(run_there("-m", "tests.cuda_env.imports_worker"))
    assert found["failed"] == {}
    assert found["imported"] > 200
    assert found["versions"]["cuda"].startswith("13.")
    assert found["versions"]["transformer-engine-torch"] == "2.11.0"


def test_models_of_transformer_engine_meet_the_weight_maps(models: dict[str, dict[str, list[str]]]) -> None:
    assert len(models) == 7 * 2 * 3
    assert {name: found for name, found in models.items() if found["missing"] or found["extra"]} == {}


def test_both_specs_have_the_same_parts_and_checkpoints(models: dict[str, dict[str, list[str]]]) -> None:
    assert {name: found for name, found in models.items() if found["differ"] or found["states"]} == {}


def test_models_are_made_of_transformer_engines_layers(models: dict[str, dict[str, list[str]]]) -> None:
    attention = {"TEDotProductAttention", "TERowParallelLinear"}
    for name, found in models.items():
        assert attention <= set(found["classes"]), name
        experts = any("Grouped" in kind for kind in found["classes"])
        assert experts == name.startswith("qwen3-moe"), name


def test_vllm_takes_our_settings_for_a_gpu(rollout: dict[str, Any]) -> None:
    families = {name: found for name, found in rollout.items() if name not in ("sampling", "classes")}
    assert len(families) == 7
    for name, found in families.items():
        assert found["v2"] and found["async"] and found["sleep"] and found["chunked"], name
        assert (found["mode"], found["logprobs"], found["kv_bytes"]) == ("VLLM_COMPILE", "processed_logprobs", 1 << 30)
        assert found["bytes"][0] == found["bytes"][1] > 0, name
    assert families["olmo3"]["architecture"] == "TransformersForCausalLM"


def test_a_layers_delayed_scales_go_into_another(run_there: Run) -> None:
    found = last_line(run_there("-m", "tests.cuda_env.te_scales_worker"))
    assert found["length"] == 4 and found["same"]
    assert found["kept"] == ["linear.fp8_history", "linear.fp8_scales"]
    assert found["scale"] == [[1.0, 2.0, 1.0], [1.0, 1.0]]
    assert found["newest"] == [[0.0, 1.0, 0.0], [0.0, 0.0]]
    assert found["quantisers"] == [1.0, 2.0, 1.0], "what quantises refers to it"


def test_vllm_holds_fp8_where_it_is_asked_to(rollout: dict[str, Any]) -> None:
    for name in ("qwen3", "qwen3-moe"):
        share, is_whole = rollout[name]["fp8"]
        assert is_whole and 0.5 < share < 0.8, name


def test_vllm_takes_our_samples(rollout: dict[str, Any]) -> None:
    assert rollout["sampling"] == {"n": 4, "seed": (1 << 62) - 1, "logprobs": 0, "flat": True}


def test_transformers_classes_stay_as_they_are_where_vllm_compiles(rollout: dict[str, Any]) -> None:
    assert rollout["classes"] == {"compiled": True, "is_theirs": True, "left_alone": True, "others_make": True}


def test_what_is_replaced_is_there_and_looks_as_it_did(patches: dict[str, Any]) -> None:
    assert set(patches["gone"]) - set.union(*REPLACED.values()) == MORE_REPLACED
    wrong = {n: told for n, told in patches["gone"].items() if f"{n} does not exist, and tempo-megatron" not in told}
    assert wrong == {}


def test_what_is_replaced_is_read(patches: dict[str, Any]) -> None:
    assert patches["unread"] == []


def test_doctor_says_what_is_missing(run_there: Run) -> None:
    """As a user has it: without a GPU and without a driver."""
    result = run_there("-m", "tempo_megatron", "doctor", driver=False)
    assert result.returncode == 3, result.stderr
    told = " ".join(result.stdout.split())
    assert "sees no GPU" in told and "transformer engine" in told
    assert "not installed:" not in told


def test_an_update_is_planned_on_a_login_node(run_there: Run, tmp_path: Path) -> None:
    from tests.model.parity_cases import config_of

    config_of("qwen3").save_pretrained(tmp_path)
    arguments = ["--hf", tmp_path, "--ranks", "2", "--tp", "2", "--rollout-tp", "2"]
    assert "buffers on a GPU" in run_there("-m", "tempo_megatron", "sync-plan", *arguments, driver=False).check().stdout
