"""Both converters in this process: round trips over layouts, dtypes, verification, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempo_megatron.checkpoint.convert.command import hf_to_megatron, megatron_to_hf
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import resolve_init
from tests.checkpoint.convert_models import FAMILIES, write_folder
from tests.checkpoint.folders import reseal

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
LAYOUTS = ["", "--tp 2", "--pp 4", "--tp 2 --pp 2", "--tp 2 --pp 2 --vpp 2"]
MOE_LAYOUTS = ["", "--ep 4", "--tp 2 --ep 2", "--pp 2 --vpp 2 --ep 2"]
CASES = [(family, layout) for family in FAMILIES for layout in (MOE_LAYOUTS if family == "qwen3-moe" else LAYOUTS)]
#: Stages of 1, 2 and 1 layers; four ranks of two KV heads, whose qkv is cut within a head.
CASES += [("olmo3", "--pp 3"), ("qwen3-moe", "--tp 4 --pp 3 --ep 2"), ("qwen2", "--tp 4 --pp 3")]
CRITIC_CASES = [
    ("qwen3", "--tp 2"),
    ("qwen2", "--tp 2 --pp 2"),
    ("llama-tied", "--pp 2"),
    ("olmo3", "--tp 2 --pp 2"),
    ("qwen3-moe", "--ep 2"),
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the converters set it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes each HF folder once; for reading only."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str, role: str = "actor", dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{family}-{role}-{dtype}"
        return path if path.is_dir() else write_folder(path, family, role, dtype)

    return make


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def assert_same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def error_of(capsys: pytest.CaptureFixture[str], command: Callable[..., int], *arguments: object, code: int = 2) -> str:
    """The one line that a refused command says."""
    capsys.readouterr()
    assert command([str(a) for a in arguments]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    (line,) = (line for line in lines if line.startswith("error: "))
    assert line == lines[-1]
    return line


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_policy_there_and_back(folder: Callable[..., Path], tmp_path: Path, family: str, layout: str) -> None:
    source, there, back = folder(family), tmp_path / "there", tmp_path / "back"
    assert hf_to_megatron(["--hf", str(source), "--megatron", str(there), *layout.split()]) == 0
    assert megatron_to_hf(["--megatron", str(there), "--hf", str(back), "--shard-gib", "0.00004"]) == 0
    assert len(list(back.glob("*.safetensors"))) > 1
    assert_same_bytes(tensors(back), tensors(source))
    for name in SIDE_FILES:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize(("family", "layout"), CRITIC_CASES)
def test_critic_there_and_back(folder: Callable[..., Path], tmp_path: Path, family: str, layout: str) -> None:
    source, there, back = folder(family, "critic"), tmp_path / "there", tmp_path / "back"
    assert hf_to_megatron(["--hf", str(source), "--megatron", str(there), "--critic", *layout.split()]) == 0
    assert resolve_init(str(there), "critic.init").path == there
    with pytest.raises(TempoError, match=r"^actor\.init: checkpoint .*there holds a critic only$"):
        resolve_init(str(there), "actor.init")
    assert megatron_to_hf(["--megatron", str(there), "--hf", str(back), "--critic", "--verify"]) == 0
    assert_same_bytes(tensors(back), tensors(source))
    for name in SIDE_FILES:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("family", ["qwen3", "llama-tied"])
def test_critic_of_trl_there_and_back(folder: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """With the output layer that it came with; in the other form on request."""
    source, there, back, other = (shutil.copytree(folder(family), tmp_path / "trl"), *(tmp_path / n for n in "abc"))
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.randn(1)}
    origin = {**tensors(source), **head}
    for path in source.glob("model*"):
        path.unlink()
    save_file(origin, source / "model.safetensors", metadata={"format": "pt"})
    assert hf_to_megatron(["--hf", str(source), "--megatron", str(there), "--critic", "--pp", "2"]) == 0
    assert megatron_to_hf(["--megatron", str(there), "--hf", str(back), "--critic"]) == 0
    assert_same_bytes(tensors(back), origin)
    for name in SIDE_FILES:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name
    assert megatron_to_hf(["--megatron", str(there), "--hf", str(other), "--critic", "--head", "score"]) == 0
    assert torch.equal(tensors(other)["score.weight"], head["v_head.summary.weight"])
    assert "lm_head.weight" not in tensors(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_model_as_a_critic(folder: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """Its score of a text is the value of the last token, and comes back as a token classifier's (or a v_head)."""
    there, back = tmp_path / "there", tmp_path / "back"
    source = shutil.copytree(folder(family), tmp_path / "reward", ignore=shutil.ignore_patterns("model*"))
    config = hf.AutoConfig.from_pretrained(source, num_labels=1)
    reward = hf.AutoModelForSequenceClassification.from_config(config).eval()
    reward.save_pretrained(source)
    assert "score.bias" not in tensors(source)
    assert hf_to_megatron(["--hf", str(source), "--megatron", str(there), "--critic", "--verify"]) == 0
    assert megatron_to_hf(["--megatron", str(there), "--hf", str(back), "--critic", "--verify"]) == 0
    ids = torch.arange(7).unsqueeze(0)
    with torch.no_grad():
        wanted = reward(ids).logits[0, 0]
        if family == "olmo3":
            assert tensors(back)["v_head.summary.bias"].item() == 0
            hidden = hf.AutoModel.from_pretrained(back).eval()(ids).last_hidden_state[0, -1]
            value = (hidden @ tensors(back)["v_head.summary.weight"].T)[0]
        else:
            value = hf.AutoModelForTokenClassification.from_pretrained(back).eval()(ids).logits[0, -1, 0]
    torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("family", ["qwen3", "llama-tied"])
def test_reward_model_of_two_labels(
    folder: Callable[..., Path], tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(folder(family), tmp_path / "reward", ignore=shutil.ignore_patterns("model*"))
    config = hf.AutoConfig.from_pretrained(source, num_labels=2)
    hf.AutoModelForSequenceClassification.from_config(config).save_pretrained(source)
    command = ["--hf", source, "--megatron", tmp_path / "there", "--critic"]
    error = error_of(capsys, hf_to_megatron, *command)
    assert f"{source / 'config.json'}: num_labels (id2label) is 2; a critic has 1" in error


def test_layout_to_layout_by_way_of_hf(folder: Callable[..., Path], tmp_path: Path) -> None:
    """The files of one layout, made again from the HF folder that another layout gave, are the same bytes."""
    source = folder("qwen3")
    command = ["--megatron", str(tmp_path / "a"), "--tp", "2", "--pp", "2"]
    assert hf_to_megatron(["--hf", str(source), *command]) == 0
    assert megatron_to_hf(["--megatron", str(tmp_path / "a"), "--hf", str(tmp_path / "hf")]) == 0
    for name, origin in (("b", tmp_path / "hf"), ("c", source)):
        assert hf_to_megatron(["--hf", str(origin), "--megatron", str(tmp_path / name), "--pp", "4"]) == 0
    files = sorted(path.name for path in (tmp_path / "b" / "actor").glob("*.distcp"))
    assert files == [f"__{rank}_0.distcp" for rank in range(4)]
    for name in files:
        assert (tmp_path / "b" / "actor" / name).read_bytes() == (tmp_path / "c" / "actor" / name).read_bytes()


def test_fresh_head(folder: Callable[..., Path], tmp_path: Path) -> None:
    source, there, back = folder("llama-tied"), tmp_path / "there", tmp_path / "back"
    make_critic = ["--hf", str(source), "--megatron", str(there), "--critic", "--init-head", "--pp", "2", "--verify"]
    assert hf_to_megatron(make_critic) == 0
    assert megatron_to_hf(["--megatron", str(there), "--hf", str(back), "--critic", "--verify"]) == 0
    found = tensors(back)
    assert found.pop("score.weight").eq(0).all()
    assert found.pop("score.bias").eq(0.5).all()
    assert_same_bytes(found, tensors(source))
    assert json.loads((back / "config.json").read_text())["architectures"] == ["LlamaForTokenClassification"]


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept(folder: Callable[..., Path], tmp_path: Path, dtype: torch.dtype) -> None:
    source, there, back = folder("qwen3", "actor", dtype), tmp_path / "there", tmp_path / "back"
    assert hf_to_megatron(["--hf", str(source), "--megatron", str(there), "--tp", "2"]) == 0
    assert megatron_to_hf(["--megatron", str(there), "--hf", str(back)]) == 0
    assert_same_bytes(tensors(back), tensors(source))
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_dtype_is_chosen(folder: Callable[..., Path], tmp_path: Path) -> None:
    source, there, back = folder("qwen3"), tmp_path / "there", tmp_path / "back"
    assert hf_to_megatron(["--hf", str(source), "--megatron", str(there), "--dtype", "bfloat16", "--verify"]) == 0
    assert megatron_to_hf(["--megatron", str(there), "--hf", str(back), "--dtype", "float32", "--verify"]) == 0
    rounded = {name: tensor.bfloat16().float() for name, tensor in tensors(source).items()}
    assert_same_bytes(tensors(back), rounded)
    assert json.loads((there / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_dtypes_that_share_a_megatron_tensor(
    folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(folder("llama-tied", "critic"), tmp_path / "mixed")
    found = load_file(source / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    save_file({**found, name: found[name].half()}, source / "model.safetensors")
    command = ["--hf", str(source), "--megatron", str(tmp_path / "there"), "--critic"]
    error = error_of(capsys, hf_to_megatron, *command)
    assert f"model.safetensors: tensor {name} is float16" in error
    assert "model.layers.0.mlp.down_proj.weight is float32" in error
    assert "--dtype" in error
    assert hf_to_megatron([*command, "--dtype", "float32"]) == 0


# ---------------------------------------------------------------- verification


def test_verify_tells_what_it_compared(
    folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, there = folder("qwen3", "critic"), tmp_path / "there"
    assert hf_to_megatron(["--hf", str(source), "--megatron", str(there), "--tp", "2", "--critic", "--verify"]) == 0
    assert megatron_to_hf(["--megatron", str(there), "--hf", str(tmp_path / "b"), "--critic", "--verify"]) == 0
    count = len(tensors(source))
    assert capsys.readouterr().out.count(f"tensors with equal SHA-256 │ {count} ") == 2


def test_verify_finds_a_flipped_bit_of_a_checkpoint(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tempo_megatron.checkpoint.convert.to_megatron as module

    original = module.write_checkpoint

    def write_and_flip(source: object, partial: Path, *rest: object) -> None:
        original(source, partial, *rest)
        tensor = tensors(folder("qwen3"))["model.layers.3.mlp.down_proj.weight"][:, :24].contiguous()
        wanted = tensor.view(torch.uint8).numpy().tobytes()
        files = [path for path in (partial / "actor").glob("*.distcp") if wanted in path.read_bytes()]
        data = bytearray(files[0].read_bytes())
        data[data.index(wanted) + 5] ^= 1
        files[0].write_bytes(data)

    monkeypatch.setattr(module, "write_checkpoint", write_and_flip)
    target = tmp_path / "there"
    command = ["--hf", folder("qwen3"), "--megatron", target, "--tp", "2", "--verify"]
    error = error_of(capsys, hf_to_megatron, *command, code=3)
    assert "tensor model.layers.3.mlp.down_proj.weight of the result differs" in error
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_a_flipped_bit_of_an_hf_folder(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tempo_megatron.checkpoint.convert.verify as module

    there = tmp_path / "there"
    assert hf_to_megatron(["--hf", str(folder("qwen3")), "--megatron", str(there)]) == 0
    original = module.verify_hf

    def flip_and_verify(source: object, partial: Path, *rest: object) -> object:
        assert not (partial / "config.json").exists()
        path = partial / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return original(source, partial, *rest)

    monkeypatch.setattr(module, "verify_hf", flip_and_verify)
    error = error_of(capsys, megatron_to_hf, "--megatron", there, "--hf", tmp_path / "back", "--verify", code=3)
    assert "tensor lm_head.weight of the result differs" in error
    assert list(tmp_path.iterdir()) == [there]


def with_output_layer(source: Path, folder: Path, factor: float) -> Path:
    """A tied policy in one file that holds its output layer too: ``factor`` times the embedding."""
    found = tensors(source)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model*"))
    head = factor * found["model.embed_tokens.weight"]
    save_file({**found, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_verify_compares_an_output_layer_that_is_stored_besides(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tempo_megatron.checkpoint.hf_check as module

    same = with_output_layer(folder("llama-tied"), tmp_path / "same", 1.0)
    other = with_output_layer(folder("llama-tied"), tmp_path / "other", 2.0)
    there = tmp_path / "there"
    assert hf_to_megatron(["--hf", str(same), "--megatron", str(there), "--tp", "2", "--verify"]) == 0
    assert f"tensors with equal SHA-256 │ {len(tensors(same))} " in capsys.readouterr().out
    command = ["--hf", other, "--megatron", tmp_path / "no", "--verify"]
    assert "lm_head.weight differs from model.embed_tokens.weight" in error_of(capsys, hf_to_megatron, *command)
    monkeypatch.setattr(module, "_check_tied", lambda tensors: None)
    error = error_of(capsys, hf_to_megatron, *command, code=3)
    assert "verification: tensor lm_head.weight of the result differs from the source's" in error


def test_verify_compares_the_output_layer_that_a_critic_carries(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tempo_megatron.checkpoint.convert.to_megatron as module

    source, there = folder("olmo3", "critic"), tmp_path / "there"
    assert hf_to_megatron(["--hf", str(source), "--megatron", str(there), "--critic", "--verify"]) == 0
    assert f"tensors with equal SHA-256 │ {len(tensors(source))} " in capsys.readouterr().out
    monkeypatch.setattr(module, "carry_lm_head", lambda source, target: None)
    command = ["--hf", source, "--megatron", tmp_path / "no", "--critic", "--verify"]
    error = error_of(capsys, hf_to_megatron, *command, code=3)
    assert "verification: tensor lm_head.weight is missing in the result" in error


def test_verify_finds_outputs_that_differ(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tempo_megatron.checkpoint.convert.verify as module

    original = module.build_model

    def build_with_other_epsilon(config: object, *rest: object) -> object:
        models = original(config, *rest)
        models[0].decoder.final_layernorm.eps = 0.1
        return models

    monkeypatch.setattr(module, "build_model", build_with_other_epsilon)
    command = ["--hf", folder("qwen3"), "--megatron", tmp_path / "there", "--verify"]
    error = error_of(capsys, hf_to_megatron, *command, code=3)
    assert "outputs of the Megatron model differ from transformers' by" in error
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- refusals


def test_refusals(folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, critic, there = folder("qwen3"), folder("qwen3", "critic"), tmp_path / "there"

    def refused(*arguments: object) -> str:
        return error_of(capsys, hf_to_megatron, "--megatron", there, *arguments)

    assert f"{tmp_path / 'no'}/config.json: missing" in refused("--hf", tmp_path / "no")
    assert "tensor score.weight is a value head: convert a critic with --critic" in refused("--hf", critic)
    assert "has no value head (score.weight); --init-head makes a fresh one" in refused("--hf", policy, "--critic")
    assert "--init-head is for critics: add --critic" in refused("--hf", policy, "--init-head")
    assert "tensor_model_parallel_size: 3 must divide" in refused("--hf", policy, "--tp", "3")
    assert "pipeline_model_parallel_size: 5 must be at most" in refused("--hf", policy, "--pp", "5")
    assert "--tp 0" in refused("--hf", policy, "--tp", "0")
    assert not there.exists()
    broken = shutil.copytree(critic, tmp_path / "broken")
    found = load_file(broken / "model.safetensors")
    for changes, told in (
        ({"model.norm.weight": None}, "model.safetensors: tensor model.norm.weight is missing"),
        ({"model.extra": torch.zeros(2)}, "model.safetensors: tensor model.extra has no place in a critic"),
        ({"model.norm.weight": torch.ones(3)}, "tensor model.norm.weight has the shape [3], config.json asks for [32]"),
        ({"model.norm.weight": torch.ones(32).long()}, "tensor model.norm.weight has the dtype I64"),
    ):
        changed = {name: t for name, t in {**found, **changes}.items() if t is not None}
        save_file(changed, broken / "model.safetensors")
        assert told in refused("--hf", broken, "--critic")
    assert not there.exists()


def test_targets_that_are_there(
    folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder("llama-tied")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for name, told in (("full", "exists and is not empty"), ("file", "exists and is a file")):
        error = error_of(capsys, hf_to_megatron, "--hf", source, "--megatron", tmp_path / name)
        assert f"{tmp_path / name}: {told}" in error
    (tmp_path / "empty").mkdir()
    assert hf_to_megatron(["--hf", str(source), "--megatron", str(tmp_path / "empty")]) == 0
    error = error_of(capsys, megatron_to_hf, "--megatron", tmp_path / "empty", "--hf", tmp_path / "full")
    assert f"{tmp_path / 'full'}: exists and is not empty" in error
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["x"]


def test_checkpoints_that_do_not_fit(
    folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    assert hf_to_megatron(["--hf", str(folder("qwen3")), "--megatron", str(there), "--tp", "2"]) == 0

    def refused(*arguments: object, code: int = 2) -> str:
        return error_of(capsys, megatron_to_hf, "--megatron", there, "--hf", tmp_path / "back", *arguments, code=code)

    assert "holds no critic (roles: actor)" in refused("--critic")
    config = json.loads((there / "hf" / "config.json").read_text())
    (there / "hf" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    assert f"{there} is damaged: hf/config.json" in refused()
    reseal(there)  # made so by whoever made it
    assert f"{there}/actor: tensor decoder.layers.mlp.linear_fc1.weight has the shape [4, 96, 32]" in refused()
    (there / "hf" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    reseal(there)
    assert f"{there}/actor: tensor output_layer.weight has no place in an actor" in refused()
    (there / "hf" / "config.json").write_text(json.dumps(config))
    data = (there / "actor" / "__1_0.distcp").read_bytes()
    (there / "actor" / "__1_0.distcp").write_bytes(data[: len(data) // 2])
    reseal(there)
    assert f"{there}/actor: the checkpoint cannot be read" in refused()
    (there / "actor" / ".metadata").unlink()
    reseal(there)
    assert f"{there}/actor: the checkpoint cannot be read" in refused()
    (there / "manifest.json").unlink()
    assert "neither a checkpoint (no manifest.json) nor a run folder" in refused()
    assert not (tmp_path / "back").exists()


def test_full_disk(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tempo_megatron.checkpoint.safetensors_stream as module

    there = tmp_path / "there"
    assert hf_to_megatron(["--hf", str(folder("qwen3")), "--megatron", str(there)]) == 0

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(module.SafetensorsWriter, "close", full)
    error = error_of(capsys, megatron_to_hf, "--megatron", there, "--hf", tmp_path / "back", code=3)
    assert f"{tmp_path / 'back'}: the conversion failed" in error
    assert "No space left on device" in error
    assert list(tmp_path.iterdir()) == [there]


@pytest.mark.parametrize("command", [hf_to_megatron, megatron_to_hf])
def test_usage(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--help"]) == 0
    assert "--verify" in capsys.readouterr().out
    assert command([]) == 2
