"""Every fault of an HF folder is told before weights are loaded, in one line with the file and the tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tempo_megatron.checkpoint.critic_format import open_hf_folder
from tempo_megatron.checkpoint.hf_check import check_hf_folder
from tempo_megatron.checkpoint.hf_read import INDEX, HFTensors, load_hf_config
from tempo_megatron.errors import TempoError
from tests.checkpoint.hf_models import classifier, policy, rewrite, stored, v_head_folder

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name: a policy in one file and in shards, a critic."""
    folder = tmp_path_factory.mktemp("good")
    policy("qwen3").save_pretrained(folder / "single")
    policy("qwen3").save_pretrained(folder / "sharded", max_shard_size="6KB")
    classifier("qwen3").save_pretrained(folder / "critic")
    v_head_folder("qwen3", folder / "v_head")
    return {path.name: path for path in folder.iterdir()}


def refusal(folder: Path, role: str, init_head: bool = False) -> str:
    with pytest.raises(TempoError) as caught:
        check_hf_folder(open_hf_folder(folder, role), load_hf_config(folder), role, init_head=init_head)
    message = str(caught.value)
    assert "\n" not in message
    return message


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as f:
        f.truncate(size)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def only_file(folder: Path, name: str) -> Path:
    """The shard with tensor ``name``."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def to_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def twice(folder: Path) -> None:
    """The final norm also in the embedding's shard."""
    rewrite(only_file(folder, "model.embed_tokens.weight"), model__norm__weight=torch.ones(16))


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": (
        "single",
        lambda f: truncate(f / "model.safetensors", 4000),
        r"/model\.safetensors: not a readable safetensors file \(truncated: tensor \S+\.weight ends at byte \d+, the "
        r"file at 4000\)",
    ),
    "truncated-header": (
        "single",
        lambda f: truncate(f / "model.safetensors", 40),
        r"/model\.safetensors: not a readable safetensors file \(its header takes \d+ bytes, the file has 40\)",
    ),
    "empty": (
        "single",
        lambda f: truncate(f / "model.safetensors", 0),
        r"/model\.safetensors: not a readable safetensors file \(.*\)",
    ),
    "bad-header": (
        "single",
        lambda f: (f / "model.safetensors").write_bytes(b"\x06" + bytes(7) + b"{wrong"),
        r"/model\.safetensors: not a readable safetensors file \(.*\)",
    ),
    "no-weights": (
        "single",
        lambda f: (f / "model.safetensors").unlink(),
        r": no \*\.safetensors file \(nothing else is read\)",
    ),
    "pickle": ("single", to_bin, r": no \*\.safetensors file; pytorch_model\.bin is a pickle, .*: convert it .*"),
    "adapter": (
        "single",
        lambda f: (f / "adapter_config.json").write_text("{}"),
        r"/adapter_config\.json: an adapter is not read; .*",
    ),
    "int8": (
        "single",
        lambda f: rewrite(f / "model.safetensors", model__norm__weight=torch.ones(16, dtype=torch.int8)),
        r"/model\.safetensors: tensor model\.norm\.weight has the dtype I8; weights must be F32, BF16, F16 .*",
    ),
    "uint8": (
        "single",
        lambda f: rewrite(f / "model.safetensors", model__norm__weight=torch.ones(16, dtype=torch.uint8)),
        r"/model\.safetensors: tensor model\.norm\.weight has the dtype U8; .*",
    ),
    "float8": (
        "single",
        lambda f: rewrite(f / "model.safetensors", model__norm__weight=torch.ones(16).to(torch.float8_e4m3fn)),
        r"/model\.safetensors: tensor model\.norm\.weight has the dtype F8_E4M3; .*",
    ),
    "missing": (
        "single",
        lambda f: rewrite(f / "model.safetensors", model__norm__weight=None),
        r"/model\.safetensors: tensor model\.norm\.weight is missing; config\.json asks for it",
    ),
    "missing-in-index": (
        "sharded",
        lambda f: (
            rewrite(only_file(f, NORM), model__norm__weight=None),
            edit_index(f, lambda m: m.pop(NORM)),
        ),
        r"/model\.safetensors\.index\.json: tensor model\.norm\.weight is missing; config\.json asks for it",
    ),
    "extra": (
        "single",
        lambda f: rewrite(f / "model.safetensors", model__layers__2__mlp__up_proj__weight=torch.ones(24, 16)),
        r"/model\.safetensors: tensor model\.layers\.2\.mlp\.up_proj\.weight has no place in an actor of "
        r"Qwen3ForCausalLM",
    ),
    "bias": (
        "single",
        lambda f: rewrite(
            f / "model.safetensors",
            model__layers__0__self_attn__q_proj__bias=torch.ones(24),
            model__layers__1__self_attn__q_proj__bias=torch.ones(24),
        ),
        r"/model\.safetensors: tensor model\.layers\.0\.self_attn\.q_proj\.bias has no place in an actor of "
        r"Qwen3ForCausalLM \(and 1 more\)",
    ),
    "shape": (
        "single",
        lambda f: rewrite(f / "model.safetensors", model__norm__weight=torch.ones(17)),
        r"/model\.safetensors: tensor model\.norm\.weight has the shape \[17\], config\.json asks for \[16\]",
    ),
    "vocabulary": (
        "single",
        lambda f: edit_config(f, vocab_size=14),
        r"/model\.safetensors: tensor lm_head\.weight has the shape \[13, 16\], config\.json asks for \[14, 16\]",
    ),
    "missing-shard": (
        "sharded",
        lambda f: only_file(f, NORM).unlink(),
        r"/model-\d+-of-\d+\.safetensors: missing; model\.safetensors\.index\.json says that tensor \S+\.weight is in "
        r"it",
    ),
    "index-names-absent-tensor": (
        "sharded",
        lambda f: edit_index(f, lambda m: m.update({"model.more.weight": m[NORM]})),
        r"/model-\d+-of-\d+\.safetensors: tensor model\.more\.weight is missing; .* says that it is here",
    ),
    "index-names-other-shard": (
        "sharded",
        lambda f: edit_index(f, lambda m: m.update({NORM: m["model.embed_tokens.weight"]})),
        r"/model-\d+-of-\d+\.safetensors: tensor model\.norm\.weight is missing; .* says that it is here",
    ),
    "not-in-index": (
        "sharded",
        lambda f: edit_index(f, lambda m: m.pop(NORM)),
        r"/model-\d+-of-\d+\.safetensors: tensor model\.norm\.weight is not named in model\.safetensors\.index\.json",
    ),
    "twice": (
        "sharded",
        twice,
        r"/model-\d+-of-\d+\.safetensors: tensor model\.norm\.weight is also in model-\d+-of-\d+\.safetensors; .*",
    ),
    "twice-without-index": (
        "sharded",
        lambda f: (twice(f), (f / INDEX).unlink()),
        r"/model-\d+-of-\d+\.safetensors: tensor model\.norm\.weight is also in model-\d+-of-\d+\.safetensors; .*",
    ),
    "index-and-single-file": (
        "sharded",
        lambda f: shutil.copy(only_file(f, NORM), f / "model.safetensors"),
        r"/model\.safetensors\.index\.json: model\.safetensors is there too, .*",
    ),
    "index-not-json": (
        "sharded",
        lambda f: (f / INDEX).write_text("{"),
        r"/model\.safetensors\.index\.json: not a safetensors index: .*",
    ),
    "index-leaves-folder": (
        "sharded",
        lambda f: edit_index(f, lambda m: m.update({NORM: "../single/model.safetensors"})),
        r"/model\.safetensors\.index\.json: not a safetensors index: .*",
    ),
    "architecture": (
        "single",
        lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]),
        r"/config\.json: architectures: \['GPT2LMHeadModel'\] is not supported; supported: .*Qwen3ForCausalLM.*",
    ),
    "model-type": (
        "single",
        lambda f: edit_config(f, model_type="nothing"),
        r"/config\.json: not a config that transformers knows: .*",
    ),
    "config-value": (
        "single",
        lambda f: edit_config(f, hidden_size="wide"),
        r"/config\.json: not a config that transformers knows: .*hidden_size.*",
    ),
    "feature": (
        "single",
        lambda f: edit_config(f, attention_bias=True),
        r"/config\.json: Qwen3ForCausalLM: attention_bias: true is not supported .*",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_one_line_with_file_and_tensor(good: dict[str, Path], tmp_path: Path, name: str) -> None:
    source, spoil, told = FAULTS[name]
    folder = shutil.copytree(good[source], tmp_path / "model")
    spoil(folder)
    assert re.fullmatch(re.escape(str(folder)) + told, message := refusal(folder, "actor")), message


CRITIC_FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no-head": ("single", lambda f: None, r" has no value head \(score\.weight\); set critic\.init_head=true .*"),
    "two-labels": (
        "critic",
        lambda f: rewrite(f / "model.safetensors", score__weight=torch.ones(2, 16), score__bias=torch.ones(2)),
        r"/model\.safetensors: tensor score\.weight has 2 rows \(num_labels in .*/config\.json\); a critic has 1",
    ),
    "two-labels-in-config": (
        "critic",
        lambda f: edit_config(f, id2label={"0": "A", "1": "B"}, label2id={"A": 0, "B": 1}),
        r"/config\.json: num_labels \(id2label\) is 2; a critic has 1",
    ),
    "head-width": (
        "v_head",
        lambda f: rewrite(f / "model.safetensors", v_head__summary__weight=torch.ones(1, 15)),
        r"/model\.safetensors: tensor v_head\.summary\.weight has the shape \[1, 15\], config\.json asks for \[1, 16\]",
    ),
    "both-heads": (
        "v_head",
        lambda f: rewrite(f / "model.safetensors", score__weight=torch.ones(1, 16)),
        r"/model\.safetensors: tensor v_head\.summary\.weight: score\.weight is there too; .*",
    ),
    "deep-head": (
        "v_head",
        lambda f: rewrite(f / "model.safetensors", v_head__summary__2__weight=torch.ones(1, 16)),
        r"/model\.safetensors: tensor v_head\.summary\.2\.weight belongs to no value head that is read; .*",
    ),
    "value-head": (
        "single",
        lambda f: rewrite(f / "model.safetensors", value_head__weight=torch.ones(1, 16)),
        r"/model\.safetensors: tensor value_head\.weight belongs to no value head that is read; .*",
    ),
    "classifier": (
        "critic",
        lambda f: rewrite(f / "model.safetensors", classifier__weight=torch.ones(1, 16)),
        r"/model\.safetensors: tensor classifier\.weight belongs to no value head that is read; .*",
    ),
    "lm-head-beside-score": (
        "critic",
        lambda f: rewrite(f / "model.safetensors", lm_head__weight=torch.ones(13, 16)),
        r"/model\.safetensors: tensor lm_head\.weight has no place in a critic of Qwen3ForCausalLM",
    ),
}


@pytest.mark.parametrize("name", CRITIC_FAULTS)
def test_critic_fault(good: dict[str, Path], tmp_path: Path, name: str) -> None:
    source, spoil, told = CRITIC_FAULTS[name]
    folder = shutil.copytree(good[source], tmp_path / "model")
    spoil(folder)
    assert re.fullmatch(re.escape(str(folder)) + told, message := refusal(folder, "critic")), message


@pytest.mark.parametrize("name", ["critic", "v_head"])
def test_actor_takes_no_critic(good: dict[str, Path], name: str) -> None:
    told = r".*/model\.safetensors: tensor (score|v_head\.summary)\.bias has no place in an actor .*"
    assert re.fullmatch(told, refusal(good[name], "actor"))


@pytest.mark.parametrize(
    ("name", "role", "init_head", "keeps_head"),
    [
        ("single", "actor", False, False),
        ("sharded", "actor", False, False),
        ("single", "critic", True, True),
        ("critic", "critic", False, False),
        ("critic", "critic", True, False),
        ("v_head", "critic", False, False),
    ],
)
def test_good_folders_pass(good: dict[str, Path], name: str, role: str, init_head: bool, keeps_head: bool) -> None:
    folder = good[name]
    tensors = open_hf_folder(folder, role)
    assert check_hf_folder(tensors, load_hf_config(folder), role, init_head=init_head) is keeps_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_layer_of_a_tied_policy_that_is_not_the_embedding(tmp_path: Path, dtype: torch.dtype) -> None:
    """transformers drops it without a word; with another dtype, equal numbers are the same layer."""
    policy("llama-tied").to(dtype).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    head = stored(tmp_path)["model.embed_tokens.weight"].float()
    rewrite(path, lm_head__weight=head)
    assert not check_hf_folder(HFTensors(tmp_path), load_hf_config(tmp_path), "actor", init_head=False)
    head[-1, -1] += 1
    rewrite(path, lm_head__weight=head)
    assert refusal(tmp_path, "actor") == (
        f"{path}: tensor lm_head.weight differs from model.embed_tokens.weight, but {tmp_path / 'config.json'} says "
        "tie_word_embeddings: true, so that it would be lost; set that to false, or remove the tensor"
    )
    rewrite(path, lm_head__weight=head[:-1].clone())
    assert "tensor lm_head.weight differs from model.embed_tokens.weight" in refusal(tmp_path, "actor")
    assert check_hf_folder(HFTensors(tmp_path), load_hf_config(tmp_path), "critic", init_head=True)  # has none anyway


def test_weights_that_were_not_fetched(tmp_path: Path) -> None:
    policy("qwen3").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7031645\n")
    told = f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    assert refusal(tmp_path, "actor") == told


def test_tied_policy_may_hold_its_output_layer(tmp_path: Path) -> None:
    policy("llama-tied").save_pretrained(tmp_path)
    embedding = stored(tmp_path)["model.embed_tokens.weight"]
    rewrite(tmp_path / "model.safetensors", lm_head__weight=embedding.clone())
    assert not check_hf_folder(HFTensors(tmp_path), load_hf_config(tmp_path), "actor", init_head=False)


def test_headers_tell_file_shape_and_dtype(good: dict[str, Path]) -> None:
    folder = good["sharded"]
    tensors, model = HFTensors(folder), policy("qwen3")
    assert tensors.names == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert tensors.file_of(name) == only_file(folder, name)
        assert (tensors.shape_of(name), tensors.dtype_of(name)) == (tuple(tensor.shape), torch.float32)
        assert torch.equal(tensors(name), tensor)
    with pytest.raises(TempoError, match=r"/model\.safetensors\.index\.json: tensor nothing is missing$"):
        tensors("nothing")


def test_file_that_breaks_after_it_was_opened(good: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(good["single"], tmp_path / "model")
    tensors = HFTensors(folder)
    truncate(folder / "model.safetensors", 4000)
    with pytest.raises(TempoError, match=r"^\S+/model\.safetensors: tensor model\.norm\.weight cannot be read \(.*\)$"):
        tensors(NORM)
