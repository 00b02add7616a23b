"""The two forms in which HF folders hold a critic; inside this project there is only ``score.weight`` and ``.bias``.

``score``
    transformers' ``AutoModelForTokenClassification`` with one label: ``score.weight`` [1, h] and ``score.bias`` [1].
    verl and the reference code write and read it for every family that has such a class.  A reward model,
    ``AutoModelForSequenceClassification`` with one label (TRL's and OpenRLHF's have ``score.weight`` and no bias), is
    read in this form too: its score of a whole text is the value of the last token.  It is written back as a token
    classifier, since the other class has no place for the bias that is trained.
``v_head``
    TRL's ``AutoModelForCausalLMWithValueHead``: ``v_head.summary.weight`` [1, h] and ``.bias`` [1] beside the whole
    policy, its ``lm_head.weight`` included. verl and the reference code fall back to it for the other families (OLMo-3
    among them), and LLaMA-Factory keeps the two tensors in ``value_head.safetensors``. TRL finds them in a local
    folder only if that has a single ``model.safetensors``; the reference code reads ``model-*.safetensors`` too.

A critic does not train an output layer. One that was read from a ``v_head`` folder keeps that folder's in
``lm_head.safetensors`` beside its config, in every checkpoint, from where it is written back unchanged. A ``v_head``
folder of any other critic has no ``lm_head.weight``: with tied embeddings it needs none, otherwise
TRL warns and makes a random one, on which values do not depend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

from tempo_megatron.checkpoint.hf_read import HFTensors, StoredTensor, read_header
from tempo_megatron.config.architectures import TOKEN_CLASSIFIER
from tempo_megatron.errors import TempoError
from tempo_megatron.model.families import family_of
from tempo_megatron.model.hf_tensors import LM_HEAD

HeadFormat = Literal["score", "v_head"]

#: Key of a critic's config.json that says what turns the head's output into a value; absent: nothing does.
ACTIVATION = "value_head_activation"

WEIGHT, BIAS = "score.weight", "score.bias"
V_HEAD = {WEIGHT: "v_head.summary.weight", BIAS: "v_head.summary.bias"}

#: LLaMA-Factory's file with the two ``v_head`` tensors.
VALUE_HEAD_FILE = "value_head.safetensors"
#: What a checkpoint keeps of a ``v_head`` folder.
LM_HEAD_FILE = "lm_head.safetensors"

#: Heads: of these two forms, of older OpenRLHF (``value_head``), of transformers' other families (``classifier``).
_HEADS = ("score.", "v_head.", "value_head.", "classifier.")


class CriticTensors(HFTensors):
    """An HF folder as a critic's: a head of either form is read as ``score.weight`` and ``score.bias``.

    A head without bias reads as one with bias 0. Of a ``v_head`` folder ``lm_head.weight`` is not among ``names``.

    Attributes:
        head_format: None for a policy, which has no head.
        lm_head: the ``lm_head.weight`` of a ``v_head`` folder, None if that has none.

    Raises:
        TempoError: also for heads in both forms, and for a head that is neither.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, besides=(VALUE_HEAD_FILE,))
        self.head_format: HeadFormat | None = None
        self.lm_head: StoredTensor | None = None
        forms: dict[HeadFormat, str] = {"score": WEIGHT, "v_head": V_HEAD[WEIGHT]}
        found = [form for form, name in forms.items() if name in self._stored]
        if len(found) == 2:
            raise TempoError(
                f"{self.describe(V_HEAD[WEIGHT])}: {WEIGHT} is there too; a critic has one value head, one must go"
            )
        if found:
            self.head_format = found[0]
        if self.head_format == "v_head":
            for name, key in V_HEAD.items():
                if key in self._stored:
                    self._stored[name] = self._stored.pop(key)
            self.lm_head = self._stored.pop(LM_HEAD, None)
        self._refuse_other_heads()
        self._zero_bias = self.head_format is not None and BIAS not in self._stored
        if self._zero_bias:
            self._stored[BIAS] = replace(self._stored[WEIGHT], key=BIAS, shape=(1,))

    def _refuse_other_heads(self) -> None:
        own = {WEIGHT, BIAS} if self.head_format else set()
        for name in sorted(self._stored):
            if name.startswith(_HEADS) and name not in own:
                raise TempoError(
                    f"{self.describe(name)} belongs to no value head that is read; those are {WEIGHT} and {BIAS}, or "
                    f"{V_HEAD[WEIGHT]} and {V_HEAD[BIAS]}"
                )

    def __call__(self, name: str) -> Tensor:
        if name == BIAS and self._zero_bias:
            return torch.zeros(1, dtype=self.dtype_of(name))
        return super().__call__(name)


def open_hf_folder(folder: Path, role: str) -> HFTensors:
    """The tensors of an HF folder as a role reads them; raises as ``HFTensors`` and ``CriticTensors`` do."""
    return CriticTensors(folder) if role == "critic" else HFTensors(folder)


# ---------------------------------------------------------------- writing


def head_format_for(config: PretrainedConfig, wanted: HeadFormat | None = None) -> HeadFormat:
    """The form in which a critic is written: ``score`` where transformers can read that, else ``v_head``.

    Raises:
        TempoError: ``score`` is wanted of a family without a token-classification class, and did not come as such.
    """
    came_so = any(name.endswith(TOKEN_CLASSIFIER) for name in config.architectures or ())
    readable = came_so or config.model_type in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    if wanted == "score" and not readable:
        raise TempoError(
            f"head format score: transformers has no token-classification class for {family_of(config).architecture}; "
            "a critic of this family is written as v_head"
        )
    return wanted or ("score" if readable else "v_head")


def critic_folder(
    stream: Iterable[tuple[str, Tensor]], config: PretrainedConfig, hf_dir: Path, head_format: HeadFormat | None = None
) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
    """What ``HFWriter.write`` needs for a critic: its tensors, and changes of config.json.

    A bias of 0 is left out where ``token_classification_bias`` is false: transformers' class then has none.

    Args:
        stream: the critic's tensors, its head as ``score.weight`` and ``score.bias``.
        hf_dir: folder with its config.json and perhaps an output layer (see the module's description).
        head_format: ``head_format_for``'s by default.

    Returns:
        (name, tensor) to write; changes, which are complete when the tensors have been taken.
    """
    form = head_format_for(config, head_format)
    changes: dict[str, Any] = {}
    if form == "score":
        changes["architectures"] = [family_of(config).architecture.replace("ForCausalLM", TOKEN_CLASSIFIER)]
        if config.num_labels != 1:
            changes |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": None}
        with_bias = getattr(config, "token_classification_bias", True)
        return _score_form(stream, changes, with_bias), changes
    changes["architectures"] = [family_of(config).architecture]
    return _v_head_form(stream, carried_lm_head(hf_dir)), changes


def _score_form(
    stream: Iterable[tuple[str, Tensor]], changes: dict[str, Any], with_bias: bool
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        if name == BIAS and not with_bias:
            if not tensor.any():
                continue
            changes["token_classification_bias"] = True
        yield name, tensor


def _v_head_form(stream: Iterable[tuple[str, Tensor]], lm_head: StoredTensor | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        yield V_HEAD.get(name, name), tensor
    if lm_head is not None:
        yield LM_HEAD, lm_head.read()


def carried_lm_head(hf_dir: Path) -> StoredTensor | None:
    """The output layer that a ``v_head`` critic came with: of a checkpoint's ``hf-critic/``, or of an HF folder."""
    if (hf_dir / LM_HEAD_FILE).is_file():
        return read_header(hf_dir / LM_HEAD_FILE)[0]
    if any(hf_dir.glob("*.safetensors")):
        return CriticTensors(hf_dir).lm_head
    return None


def carry_lm_head(hf_dir: Path, target: Path) -> None:
    """Keep the output layer of ``carried_lm_head``, if there is one, in the folder ``target``."""
    stored = carried_lm_head(hf_dir)
    if stored is not None:
        save_file({LM_HEAD: stored.read().clone()}, target / LM_HEAD_FILE, metadata={"format": "pt"})


def activation_change(head: str) -> dict[str, Any]:
    """What ``config.json`` of a critic with this kind of head (``CriticConfig.head``) says besides."""
    return {ACTIVATION: "sigmoid"} if head == "sigmoid" else {}


def check_activation(stored: Any, head: str, where: str) -> None:
    """TempoError if a trained head, by its config's ``value_head_activation``, is not of the kind ``critic.head``."""
    found = "sigmoid" if stored == "sigmoid" else "regression"
    if found != head:
        raise TempoError(
            f"{where}: its value head was trained as {ACTIVATION}: {stored or 'none'}; critic.head: {head} must be "
            f"{found}"
        )
