"""Proof of a conversion: equal digests of every tensor, equal forward outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from transformers import PretrainedConfig

from tempo_megatron.checkpoint.convert.to_hf import MegatronSource
from tempo_megatron.checkpoint.convert.to_megatron import HFSource, OnBytes
from tempo_megatron.checkpoint.critic_format import BIAS, LM_HEAD_FILE, WEIGHT, CriticTensors, open_hf_folder
from tempo_megatron.checkpoint.hf_read import read_header
from tempo_megatron.config.schema import ParallelConfig, RoleConfig
from tempo_megatron.errors import RunError
from tempo_megatron.locate import hf_name
from tempo_megatron.model.build import build_model
from tempo_megatron.model.hf_tensors import EMBEDDING, LM_HEAD, Role, is_rotary_buffer
from tempo_megatron.model.log_probs import output_weight
from tempo_megatron.model.weights import TensorReader
from tempo_megatron.parallel.groups import ModelParallelGroups, process_group

#: Largest difference of outputs, in parts of the largest output; both models compute in float32.
TOLERANCE = 1e-4

PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Verification:
    """What was compared and found equal.

    Attributes:
        tensors: tensors whose SHA-256 agree.
        outputs: outputs of the two models; 0 when they were not compared.
        difference: largest difference of outputs, in parts of the largest output.
    """

    tensors: int
    outputs: int
    difference: float


def verify_megatron(source: HFSource, folder: Path, on_bytes: OnBytes) -> Verification:
    """Compare the checkpoint that was written into ``folder`` with every tensor of the HF folder that it was made of.

    Raises:
        RunError: naming the first tensor that differs, or the difference of the outputs.
    """
    written = MegatronSource(folder / source.role, source.config, source.role, None)
    tensors = compare_digests(_stored(source), _kept(source, written, folder), on_bytes)
    if source.fresh_head:
        return Verification(tensors, 0, 0.0)
    return Verification(tensors, *compare_outputs(source.read, source.names, written))


def _stored(source: HFSource) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder, whether or not it has a parameter of its own.

    But for rotary frequencies, which config.json determines, and a policy's output layer where a critic is made of it.
    """
    for name in sorted(source.tensors.names):
        if not is_rotary_buffer(name) and not (source.role == "critic" and name == LM_HEAD):
            yield name, source.read(name)
    if isinstance(source.tensors, CriticTensors) and source.tensors.lm_head is not None:
        yield LM_HEAD, source.tensors.lm_head.read()


def _kept(source: HFSource, written: MegatronSource, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors under the names of ``_stored``: a tied output layer is the embedding once more."""
    for name, tensor in written:
        if not (source.fresh_head and name in (WEIGHT, BIAS)):
            yield name, tensor
        if name == EMBEDDING and source.role == "actor" and LM_HEAD in source.tensors.names - set(source.names):
            yield LM_HEAD, tensor
    carried = folder / hf_name(source.role) / LM_HEAD_FILE
    if carried.is_file():
        yield LM_HEAD, read_header(carried)[0].read()


def verify_hf(source: MegatronSource, folder: Path, on_bytes: OnBytes) -> Verification:
    """Compare the safetensors files that were written into ``folder`` with the checkpoint that they were made of.

    Raises:
        RunError: naming the first tensor that differs, or the difference of the outputs.
    """
    written = open_hf_folder(folder, source.role)
    names = sorted(written.names)
    tensors = compare_digests(source, ((name, written(name)) for name in names), on_bytes)
    return Verification(tensors, *compare_outputs(written, names, source))


def compare_digests(
    expected: Iterable[tuple[str, Tensor]], found: Iterable[tuple[str, Tensor]], on_bytes: OnBytes
) -> int:
    """Number of tensors; RunError naming the first that is missing, that is one too many, or that differs."""
    digests = dict(_digests(expected, on_bytes))
    count = len(digests)
    for name, digest in _digests(found, on_bytes):
        if name not in digests:
            raise RunError(f"verification: tensor {name} is in the result but not in the source")
        if digests.pop(name) != digest:
            raise RunError(f"verification: tensor {name} of the result differs from the source's")
    if digests:
        raise RunError(f"verification: tensor {min(digests)} is missing in the result")
    return count


def _digests(tensors: Iterable[tuple[str, Tensor]], on_bytes: OnBytes) -> Iterator[tuple[str, bytes]]:
    for name, tensor in tensors:
        data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
        header = f"{tensor.dtype} {list(tensor.shape)} ".encode()
        digest = hashlib.sha256(header)
        digest.update(data)
        on_bytes(tensor.nbytes)
        yield name, digest.digest()


def compare_outputs(hf: TensorReader, names: Iterable[str], megatron: MegatronSource) -> tuple[int, float]:
    """Logits or values of a fixed prompt by transformers and by Megatron, one model in memory at a time.

    Args:
        hf, names: HF tensors of the model; a critic's head as ``score.weight`` and ``score.bias``.

    Returns:
        number of outputs, and their largest difference in parts of the largest output.

    Raises:
        RunError: it is above ``TOLERANCE``.
    """
    ids = (torch.arange(PROMPT_TOKENS) * 7919 + 13) % megatron.config.vocab_size
    wanted = _hf_outputs(hf, names, megatron.config, megatron.role, ids)
    found = _megatron_outputs(megatron, ids)
    difference = ((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-6)).item()
    if not difference <= TOLERANCE:
        raise RunError(
            f"verification: outputs of the Megatron model differ from transformers' by {difference:.1e} of the largest "
            f"(tolerance {TOLERANCE:.0e})"
        )
    return wanted.numel(), difference


@torch.no_grad()
def _hf_outputs(hf: TensorReader, names: Iterable[str], config: PretrainedConfig, role: Role, ids: Tensor) -> Tensor:
    """``[t, vocabulary]`` logits or ``[t, 1]`` values, float32."""
    transformers.utils.logging.disable_progress_bar()
    head = {WEIGHT, BIAS}
    tensors = {name: hf(name) for name in names if name not in head}  # mapped, not read
    auto = transformers.AutoModelForCausalLM if role == "actor" else transformers.AutoModel
    with torch.device("meta"):
        model_class = type(auto.from_config(config))
    model = model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()
    if role == "actor":
        logits: Tensor = model(ids.unsqueeze(0), use_cache=False).logits[0]
        return logits
    hidden = model(ids.unsqueeze(0), use_cache=False).last_hidden_state[0]
    return hidden @ hf(WEIGHT).float().T + hf(BIAS).float()


@torch.no_grad()
def _megatron_outputs(source: MegatronSource, ids: Tensor) -> Tensor:
    """``[t, vocabulary]`` logits or ``[t, 1]`` values, float32."""
    role_config = RoleConfig(init="-", dtype="float32", layer_spec="torch")
    with process_group("gloo", dist.HashStore(), 0, 1):
        groups = ModelParallelGroups(ParallelConfig(), 60)
        with groups.active():
            tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
            (model,) = build_model(source.config, source.role, role_config, groups)
            parameters = dict(model.named_parameters())
            for part, value in source.parameters():
                parameters[part.name].copy_(value)
            ends = torch.tensor([0, len(ids)], dtype=torch.int32)
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=ends,
                cu_seqlens_kv=ends,
                max_seqlen_q=len(ids),
                max_seqlen_kv=len(ids),
            )
            positions = torch.arange(len(ids)).unsqueeze(0)
            outputs: Tensor = model.eval()(ids.unsqueeze(0), positions, None, packed_seq_params=packed)[0]
            if source.role == "actor":
                outputs = outputs @ output_weight(model)[: source.config.vocab_size].T
    return outputs.float()
