"""Critics of transformers' and of TRL's form: read alike, written back to the same bytes, converted to equal values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor

from tempo_megatron.checkpoint.critic_format import (
    ACTIVATION,
    LM_HEAD_FILE,
    HeadFormat,
    activation_change,
    carry_lm_head,
    check_activation,
    critic_folder,
    head_format_for,
    open_hf_folder,
)
from tempo_megatron.checkpoint.hf_check import check_hf_folder
from tempo_megatron.checkpoint.hf_read import load_hf_config
from tempo_megatron.checkpoint.hf_write import HFWriter, copy_side_files
from tempo_megatron.errors import TempoError
from tests.checkpoint.hf_models import (
    CLOSE,
    FAMILIES,
    classifier,
    config_of,
    policy,
    rewrite,
    same_tensors,
    score_values,
    stored,
    token_ids,
    v_head_folder,
    v_head_values,
)


def score_folder(family: str, folder: Path) -> Path:
    classifier(family).save_pretrained(folder)
    return folder


def canonical(folder: Path) -> dict[str, Tensor]:
    """A critic's tensors as this project has them, checked to be all of them."""
    tensors = open_hf_folder(folder, "critic")
    assert not check_hf_folder(tensors, load_hf_config(folder), "critic", init_head=False)
    return {name: tensors(name) for name in sorted(tensors.names)}


def written(source: Path, target: Path, form: HeadFormat | None = None) -> Path:
    """``source`` through the project's names into ``target``."""
    tensors, changes = critic_folder(canonical(source).items(), load_hf_config(source), source, form)
    HFWriter(target, 4096).write(tensors, source, changes)
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_score_returns_the_same_bytes(tmp_path: Path, family: str) -> None:
    source = score_folder(family, tmp_path / "source")
    target = written(source, tmp_path / "target")
    assert same_tensors(stored(target), stored(source))
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    torch.testing.assert_close(score_values(target, token_ids()), score_values(source, token_ids()), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_v_head_returns_the_same_bytes(tmp_path: Path, family: str) -> None:
    source = v_head_folder(family, tmp_path / "source")
    assert ("lm_head.weight" in stored(source)) is (family == "qwen3")
    assert "lm_head.weight" not in canonical(source)
    target = written(source, tmp_path / "target", "v_head")
    assert same_tensors(stored(target), stored(source))
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    torch.testing.assert_close(v_head_values(target, token_ids()), v_head_values(source, token_ids()), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_form_becomes_the_other_with_equal_values(tmp_path: Path, family: str) -> None:
    ids = token_ids()
    source = v_head_folder(family, tmp_path / "v_head")
    values = v_head_values(source, ids)
    assert values.std() > 0.1
    as_score = written(source, tmp_path / "score")
    assert torch.allclose(score_values(as_score, ids), values, atol=1e-5)
    assert json.loads((as_score / "config.json").read_text())["architectures"][0].endswith("ForTokenClassification")
    back = written(as_score, tmp_path / "back", "v_head")
    torch.testing.assert_close(v_head_values(back, ids), values, **CLOSE)
    assert json.loads((back / "config.json").read_text())["architectures"] == [type(policy(family)).__name__]


def test_output_layer_is_carried_through_checkpoints(tmp_path: Path) -> None:
    """HF folder -> one checkpoint's ``hf-critic`` -> the next one's -> HF folder."""
    source = v_head_folder("qwen3", tmp_path / "source")
    for here, there in ((source, tmp_path / "first"), (tmp_path / "first", tmp_path / "second")):
        copy_side_files(here, there)
        carry_lm_head(here, there)
    tensors, changes = critic_folder(canonical(source).items(), load_hf_config(source), tmp_path / "second", "v_head")
    HFWriter(tmp_path / "target").write(tensors, tmp_path / "second", changes)
    assert same_tensors(stored(tmp_path / "target"), stored(source))
    assert not (tmp_path / "target" / LM_HEAD_FILE).exists()


@pytest.mark.parametrize("kind", ["critic", "policy"])
def test_nothing_is_carried_of_other_folders(tmp_path: Path, kind: str) -> None:
    model = classifier("qwen3") if kind == "critic" else policy("qwen3")
    model.save_pretrained(tmp_path / "source")
    carry_lm_head(tmp_path / "source", tmp_path)
    assert not (tmp_path / LM_HEAD_FILE).exists()


def test_v_head_without_output_layer(tmp_path: Path) -> None:
    """Ours, written from a ``score`` critic: values need no ``lm_head``."""
    source = score_folder("qwen3", tmp_path / "score")
    target = written(source, tmp_path / "v_head", "v_head")
    assert "lm_head.weight" not in stored(target)
    assert torch.allclose(v_head_values(target, token_ids()), score_values(source, token_ids()), atol=1e-5)
    assert same_tensors(canonical(target), canonical(source))


def test_value_head_file_beside_a_policy(tmp_path: Path) -> None:
    """LLaMA-Factory's: the two tensors in a file of their own; a policy may have it lying there."""
    together = v_head_folder("qwen3", tmp_path / "together")
    apart = shutil.copytree(together, tmp_path / "apart")
    head = {name: tensor for name, tensor in stored(together).items() if name.startswith("v_head.")}
    rewrite(apart / "model.safetensors", **{name.replace(".", "__"): None for name in head})
    save_file(head, apart / "value_head.safetensors")
    assert same_tensors(canonical(apart), canonical(together))
    assert not check_hf_folder(open_hf_folder(apart, "actor"), load_hf_config(apart), "actor", init_head=False)


@pytest.mark.parametrize("with_bias_key", [True, False])
def test_head_without_bias_has_bias_zero(tmp_path: Path, with_bias_key: bool) -> None:
    source = tmp_path / "source"
    classifier("qwen3", token_classification_bias=False).save_pretrained(source)
    assert "score.bias" not in stored(source)
    if not with_bias_key:  # as other programs write it
        config = json.loads((source / "config.json").read_text())
        del config["token_classification_bias"]
        (source / "config.json").write_text(json.dumps(config))
    assert torch.equal(canonical(source)["score.bias"], torch.zeros(1))
    target = written(source, tmp_path / "target")
    if with_bias_key:
        assert same_tensors(stored(target), stored(source))
        assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
        torch.testing.assert_close(score_values(target, token_ids()), score_values(source, token_ids()), **CLOSE)
    else:
        assert same_tensors(stored(target), {**stored(source), "score.bias": torch.zeros(1)})


def test_trained_bias_is_written_although_there_was_none(tmp_path: Path) -> None:
    source = tmp_path / "source"
    classifier("qwen3", token_classification_bias=False).save_pretrained(source)
    tensors = {**canonical(source), "score.bias": torch.full((1,), 0.5)}
    stream, changes = critic_folder(tensors.items(), load_hf_config(source), source)
    HFWriter(tmp_path / "target").write(stream, source, changes)
    values = score_values(tmp_path / "target", token_ids())
    assert torch.allclose(values, score_values(source, token_ids()) + 0.5, atol=1e-5)


@pytest.mark.parametrize("form", ["score", "v_head"])
def test_dtypes_are_kept(tmp_path: Path, form: HeadFormat) -> None:
    """A bfloat16 body with a float32 head."""
    source = (score_folder if form == "score" else v_head_folder)("qwen3", tmp_path / "source")
    body = {
        name.replace(".", "__"): tensor.bfloat16()
        for name, tensor in stored(source).items()
        if not name.startswith(("score.", "v_head."))
    }
    rewrite(source / "model.safetensors", **body)
    target = written(source, tmp_path / "target", form)
    assert same_tensors(stored(target), stored(source))
    assert {t.dtype for t in stored(target).values()} == {torch.bfloat16, torch.float32}


def test_policy_config_gets_one_label(tmp_path: Path) -> None:
    """A critic that began as a policy: its config has the labels of no classifier."""
    policy("llama-tied").save_pretrained(tmp_path / "policy")
    critic = dict(classifier("llama-tied").state_dict())
    tensors, changes = critic_folder(critic.items(), load_hf_config(tmp_path / "policy"), tmp_path / "policy")
    HFWriter(tmp_path / "critic").write(tensors, tmp_path / "policy", changes)
    assert load_hf_config(tmp_path / "critic").num_labels == 1
    wanted = score_values(score_folder("llama-tied", tmp_path / "reference"), token_ids())
    torch.testing.assert_close(score_values(tmp_path / "critic", token_ids()), wanted, **CLOSE)


def test_form_that_nothing_could_read_is_not_written() -> None:
    """transformers has no Olmo3ForTokenClassification; verl and the reference code take TRL's form there."""
    olmo3 = hf.Olmo3Config(architectures=["Olmo3ForCausalLM"])
    assert head_format_for(olmo3) == "v_head"
    assert head_format_for(config_of("qwen3")) == "score"
    assert head_format_for(config_of("qwen3"), "v_head") == "v_head"


def test_score_is_refused_without_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(hf.models.auto.modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "llama")
    config = config_of("llama-tied")
    config.architectures = ["LlamaForCausalLM"]
    with pytest.raises(TempoError, match=r"no token-classification class for LlamaForCausalLM; .* as v_head$"):
        head_format_for(config, "score")


def test_stream_is_left_open_when_writing_fails(tmp_path: Path) -> None:
    """Ranks gather together: one that cannot write goes on taking from the stream."""
    source = score_folder("qwen3", tmp_path / "source")
    taken: list[str] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for item in canonical(source).items():
            taken.append(item[0])
            yield item

    items = stream()
    tensors, _ = critic_folder(items, load_hf_config(source), source)
    next(tensors)
    del tensors
    assert len(taken) + len(list(items)) > 20
    assert len(taken) == len(canonical(source))


@pytest.mark.parametrize(("stored", "head"), [(None, "sigmoid"), ("sigmoid", "regression")])
def test_a_head_of_the_other_kind_is_refused(stored: str | None, head: str) -> None:
    with pytest.raises(TempoError, match=f"FOLDER: its value head was trained as .*critic.head: {head} must be"):
        check_activation(stored, head, "FOLDER")


@pytest.mark.parametrize("head", ["sigmoid", "regression"])
def test_a_head_of_its_own_kind_is_taken(head: str) -> None:
    check_activation(activation_change(head).get(ACTIVATION), head, "FOLDER")
