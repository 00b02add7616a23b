from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tempo_megatron.config.algorithm import PRESETS
from tempo_megatron.config.load import dump_config, load_config
from tempo_megatron.config.rollout import RolloutConfig
from tempo_megatron.config.schema import Config
from tempo_megatron.errors import TempoError
from tests.launching import patience

MINIMAL = "stage: sft\noutput_dir: runs/x\nsteps: 5\nactor: {init: models/a}\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def _write(text: str, name: str = "x.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return _write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(TempoError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---------------------------------------------------------------- values


def test_minimal_file_gets_defaults(write: Any) -> None:
    config = load_config(write(MINIMAL))
    assert (config.stage, config.steps, config.actor.init) == ("sft", 5, "models/a")
    assert config.critic is None
    assert config.rollout.samples_per_prompt == 8


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("2", 2.0), (".5e-3", 5e-4), ("-0.0", 0.0)]
)
def test_numbers_without_a_point_are_numbers(write: Any, text: str, value: float) -> None:
    path = write(MINIMAL + f"critic: {{init: m, optimizer: {{lr: {text}}}}}\n")
    assert load_config(path).critic.optimizer.lr == value
    assert load_config(path, [f"actor.optimizer.lr={text}"]).actor.optimizer.lr == value


def test_yaml_1_2_words_stay_words(write: Any) -> None:
    config = load_config(write(MINIMAL + "telemetry: {wandb: off}\nseed: 7\nresume: no\n"))
    assert config.telemetry.wandb == "off"
    assert config.resume == "no"


def test_dates_and_times_stay_words(write: Any) -> None:
    config = load_config(write(MINIMAL), ["output_dir=2025-01-01", "actor.init=12:30:00"])
    assert (config.output_dir, config.actor.init) == ("2025-01-01", "12:30:00")


def test_preset_fills_in_and_explicit_keys_win(write: Any) -> None:
    path = write(MINIMAL + "algorithm: {preset: reference, mstep: {rows: unlabeled}}\n")
    algorithm = load_config(path).algorithm
    assert algorithm.mstep.rows == "unlabeled"
    assert algorithm.mstep.terminal_value == "pre_last"
    assert algorithm.filter.enabled
    switched = load_config(path, ["algorithm.preset=paper"]).algorithm
    assert (switched.mstep.terminal_value, switched.gate.enabled) == ("post_last", False)


# ---------------------------------------------------------------- bases and overrides


def test_bases_merge_deeply_and_later_ones_win(write: Any, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write("rollout: {top_k: 5, top_p: 0.5}\ndata: {train_files: [a, b]}\ncritic: {init: c}\n", "parts/one.yaml")
    write("base: one.yaml\nrollout: {top_p: 0.6, temperature: 0.7}\n", "parts/two.yaml")
    path = write(MINIMAL + "base: [parts/one.yaml, parts/two.yaml]\nrollout: {temperature: 0.8}\n"
                 "data: {train_files: [z]}\ncritic: null\n")  # fmt: skip
    config = load_config(path)
    assert (config.rollout.top_k, config.rollout.top_p, config.rollout.temperature) == (5, 0.6, 0.8)
    assert config.data.train_files == ["z"]
    assert config.critic is None


def test_a_circle_of_bases_is_refused(write: Any) -> None:
    write("base: c.yaml\n", "b.yaml")
    write("base: b.yaml\n", "c.yaml")
    message = refusal(write(MINIMAL + "base: b.yaml\n", "a.yaml"))
    assert "c.yaml: base: b.yaml closes a circle: b.yaml -> c.yaml -> b.yaml" in message


def test_a_missing_base_names_the_file_that_asks(write: Any) -> None:
    path = write(MINIMAL + "base: nowhere.yaml\n")
    assert refusal(path).startswith(f"{path}: base: no such file: {path.parent / 'nowhere.yaml'}")
    assert "base: 3 must be a file name" in refusal(write(MINIMAL + "base: 3\n"))


def test_overrides_reach_into_lists_and_absent_sections(write: Any) -> None:
    path = write(MINIMAL + "evaluation: {sets: [{name: a, files: [f]}, {name: b, files: [g]}]}\n")
    overrides = ["evaluation.sets.1.limit=3", "critic.init=m", "critic.parallel.tensor_model_parallel_size=2",
                 "data.train_files=[p, q]", "output_dir=a=b"]  # fmt: skip
    config = load_config(path, overrides)
    assert [s.limit for s in config.evaluation.sets] == [None, 3]
    assert config.critic.parallel.model_parallel_size == 2
    assert config.data.train_files == ["p", "q"]
    assert config.output_dir == "a=b"
    assert load_config(path, [*overrides, "critic=null"]).critic is None


def test_an_alias_is_not_changed_through_another_name(write: Any) -> None:
    path = write(MINIMAL + "evaluation: {sets: [&s {name: a, files: [f]}, *s]}\n")
    sets = load_config(path, ["evaluation.sets.0.name=b"]).evaluation.sets
    assert [s.name for s in sets] == ["b", "a"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("steps", "command line: 'steps' must be key=value"),
        ("=3", "must be key=value"),
        ("a..b=3", "must be key=value"),
        ("steps.x=3", "command line: steps.x=3: steps is 5, which has no keys"),
        ("data.train_files.2=a", "data.train_files is a list; '2' is not one of its positions (0 to 0)"),
        ("data.train_files.x=a", "'x' is not one of its positions (0 to 0)"),
        ("steps=[1", "command line: steps=[1: not valid YAML: "),
        ("steps=two", "command line: steps: 'two' must be a valid integer"),
        ("steps=0", "command line: steps: 0 must be greater than or equal to 1"),
        ("actor.optimizer.lrate=1", "command line: unknown key actor.optimizer.lrate (value 1); did you mean"),
    ],
)
def test_bad_overrides(write: Any, override: str, told: str) -> None:
    assert told in refusal(write(MINIMAL + "data: {train_files: [a]}\n"), override)


# ---------------------------------------------------------------- refusals of files


def test_unreadable_files(write: Any, tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory"
    assert "cannot be read: Is a directory" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"steps: \xff\xfe")
    assert "not a text file in UTF-8 (byte 7)" in refusal(tmp_path / "binary.yaml")
    assert "not valid YAML" in refusal(write("steps: \x00"))


@pytest.mark.parametrize(("text", "found"), [("", "empty"), ("- a\n", "a list"), ("hello\n", "a str")])
def test_a_file_that_is_no_mapping(write: Any, text: str, found: str) -> None:
    path = write(text)
    assert refusal(path).startswith(f"{path}: the file is {found}; a mapping is needed")


def test_broken_yaml_names_the_line(write: Any) -> None:
    path = write("stage: sft\nsteps: [1\nactor: x\n")
    assert refusal(path).startswith(f"{path}:3: not valid YAML: ")
    path = write("stage: sft\nsteps: 1\nsteps: 2\n")
    assert refusal(path) == f"{path}:3: not valid YAML: key 'steps' stands twice"
    assert ":1: not valid YAML: a key must be a word" in refusal(write("1: sft\n"))
    assert "nested too deeply" in refusal(write("data: &a {x: *a}\n"))
    assert "not valid YAML: could not determine a constructor" in refusal(write("stage: !!python/name:os.system\n"))


LEVELS = range(1, 40)
BOMBS = {
    "lists": "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in LEVELS),
    "mappings": "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in LEVELS),
    "merges": "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in LEVELS),
    "wide": "a: &a [" + "x, " * 1000 + "]\nb: [" + "*a, " * 1000 + "]\n",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_aliases_of_aliases_are_counted_before_they_are_written_out(write: Any, bomb: str) -> None:
    path = write(bomb)
    began = time.monotonic()
    assert refusal(path) == f"{path}: more than 100000 values once its aliases (*name) are written out"
    assert time.monotonic() - began < patience(2)


def test_ordinary_aliases_and_merges_are_read(write: Any) -> None:
    text = "x: &x {lr: 1e-4}\nactor:\n  init: a\n  optimizer: *x\n"
    assert ": unknown key x (value" in refusal(write(f"stage: sft\nsteps: 1\noutput_dir: o\n{text}"))
    text = "actor: {init: a, optimizer: {<<: &m {lr: 1e-4}, eps: 1e-7}}\n"
    config = load_config(write(f"stage: sft\nsteps: 1\noutput_dir: o\ndata: {{train_files: [a.parquet]}}\n{text}"))
    assert (config.actor.optimizer.lr, config.actor.optimizer.eps) == (1e-4, 1e-7)


# ---------------------------------------------------------------- refusals of keys and values


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stpes: 5\n", "unknown key stpes (value 5); did you mean steps?"),
        (
            "actor: {init: a, optimizer: {lrr: 1}}\n",
            "unknown key actor.optimizer.lrr (value 1); did you mean actor.optim",
        ),
        ("critic: {init: a, lr: 1}\n", "unknown key critic.lr (value 1); did you mean critic.optimizer.lr?"),
        ("data: {zzz: {a: 1}}\n", "valid here: train_files, labeled_prompts_per_step, "),
        ("evaluation: {sets: [{name: a, file: b}]}\n", "unknown key evaluation.sets.0.file (value 'b'); did you mean "),
        ("stage: rl\n", "stage: 'rl' must be one of 'sft', 'ppo', 'grpo', 'tempo', 'ttrl', 'empo', 'oracle', 'random'"),
        ("steps: true\n", "steps: true must be a valid integer"),
        ("steps: 5.0\n", "steps: 5.0 must be a valid integer"),
        ("seed: '5'\n", "seed: '5' must be a valid integer"),
        ("seed: 010\n", "seed: '010' must be a valid integer"),
        ("output_dir: null\n", "output_dir: null must be a valid string"),
        ("rollout: {top_p: 1.5}\n", "rollout.top_p: 1.5 must be less than or equal to 1"),
        ("rollout: {temperature: .inf}\n", "rollout.temperature: inf must be a finite number"),
        ("rollout: {kv_cache_gib: .inf}\n", "rollout.kv_cache_gib: inf must be a finite number above 0, or auto"),
        ("rollout: {kv_cache_gib: all}\n", "rollout.kv_cache_gib: 'all' must be a finite number above 0, or auto"),
        (
            "rollout: {max_log_prob_diff: off}\n",
            "rollout.max_log_prob_diff: 'off' must be a number above 0, auto or null",
        ),
        ("rollout: {max_log_prob_diff: 0}\n", "rollout.max_log_prob_diff: 0 must be a number above 0, auto or null"),
        ("rollout: 3\n", "rollout: 3 must be a section with the keys samples_per_prompt, "),
        ("critic: yes\n", "critic: 'yes' must be a section with the keys init, "),
        ("critic: {dtype: float16}\n", "critic.init: missing (HF folder, one of our checkpoints"),
        ("actor: {init: a, optimizer: {betas: [0.9]}}\n", "actor.optimizer.betas.1: missing"),
        (
            "actor: {init: a, parallel: {sequence_parallel: true}}\n",
            "actor.parallel: sequence_parallel: true needs tens",
        ),
        (
            "algorithm: {preset: [paper]}\n",
            "algorithm.preset: ['paper'] must be one of 'anchored', 'paper', 'reference'",
        ),
        ("algorithm: {estep: null}\n", "algorithm.estep: null must be a section"),
    ],
)
def test_refused_values(write: Any, text: str, told: str) -> None:
    lines = yaml.safe_load(MINIMAL)
    key = text.partition(":")[0]
    kept = "".join(f"{k}: {v}\n" for k, v in lines.items() if k != key)
    path = write(kept + text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert told in message


def test_a_misspelt_key_is_not_also_told_as_missing(write: Any) -> None:
    path = write(MINIMAL.replace("steps", "stepz"))
    assert refusal(path) == f"{path}: unknown key stepz (value 5); did you mean steps?"


def test_the_origin_is_the_file_that_says_it(write: Any) -> None:
    base = write("rollout: {top_k: x}\n", "base.yaml")
    path = write(MINIMAL + "base: base.yaml\nrollout: {top_p: 0.5}\n")
    assert refusal(path) == f"{base}: rollout.top_k: 'x' must be a valid integer"
    assert refusal(path, "rollout.top_k=y").startswith("command line: rollout.top_k: 'y'")
    both = refusal(path, "rollout.top_p=2")
    assert "command line: rollout.top_p: 2 must be" in both
    assert f"{base}: rollout.top_k" in both


def test_many_faults_stay_one_short_line(write: Any) -> None:
    message = refusal(write(MINIMAL + "".join(f"zz{i}: {'v' * 200}\n" for i in range(9))))
    assert message.endswith("; and 4 more")
    assert "v" * 60 not in message


# ---------------------------------------------------------------- dump


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_dump_loads_back(write: Any, preset: str) -> None:
    config = load_config(
        write(MINIMAL + "evaluation: {sets: [{name: a, files: [f]}]}\n"),
        [f"algorithm.preset={preset}", "algorithm.mstep.rows=all", "critic={init: c, optimizer: {lr: 3e-6}}"],
    )
    again = load_config(write(dump_config(config), "dump.yaml"))
    assert again == config
    assert isinstance(again.actor.optimizer.betas, tuple)


@given(
    text=st.one_of(
        st.text(), st.sampled_from(["1e-4", "off", "null", "~", "", "true", "010", "1_0", "12:30", "<<", "=", "\x85"])
    ),
    lr=st.floats(0, 1e6, allow_nan=False),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_value_survives_the_dump(tmp_path_factory: pytest.TempPathFactory, text: str, lr: float, seed: int) -> None:
    actor = {"init": text, "optimizer": {"lr": lr}}
    config = Config.model_validate({"stage": "sft", "output_dir": text, "steps": 1, "seed": seed, "actor": actor})
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    path.write_text(dump_config(config), "utf-8")
    assert load_config(path) == config


def test_mappings_of_the_users_own_keys(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("stage: sft\noutput_dir: o\nsteps: 1\nactor: {init: m}\ndata: {answer_types: {AMC-TTT: int}}\n")
    config = load_config(path, ["data.chat_template_kwargs.enable_thinking=false", "data.answer_types.gpqa=choice"])
    assert config.data.answer_types == {"AMC-TTT": "int", "gpqa": "choice"}
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config
    for wrong, told in (
        ("answer_types.x=3", "data.answer_types.x: 3"),
        ("chat_template_kwargs.x=[1]", "chat_template_kwargs.x"),
    ):
        with pytest.raises(TempoError, match=told) as refused:
            load_config(path, [f"data.{wrong}"])
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "trainer", "bound"),
    [
        ({"dtype": "float32"}, "float32", 1e-3),
        ({"dtype": "float32"}, "float32 fp8", 0.5),
        ({"dtype": "float32", "weights": "fp8-emulated"}, "float32", 0.5),
        ({"dtype": "float32"}, "bfloat16", 0.1),
        ({}, "bfloat16", 0.1),
        ({"top_p": 0.9}, "bfloat16", None),
        ({"top_k": 20}, "bfloat16", None),
        ({"top_p": 0.9, "max_log_prob_diff": 0.5}, "bfloat16", 0.5),
        ({"max_log_prob_diff": None}, "float32", None),
    ],
)
def test_the_first_steps_bound_by_precision(settings: dict[str, Any], trainer: str, bound: float | None) -> None:
    dtype, _, fp8 = trainer.partition(" ")
    assert RolloutConfig(**settings).log_prob_bound(dtype, fp8=bool(fp8)) == bound
