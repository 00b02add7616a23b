"""What is sampled, and what the engine that samples may hold, as settings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, ValidatorFunctionWrapHandler, field_validator
from pydantic_core import PydanticCustomError

from tempo_megatron.config.section import Section

GIB = 1 << 30


class RolloutConfig(Section):
    samples_per_prompt: int = Field(8, ge=1, description="responses to each training prompt")
    temperature: float = Field(1.0, gt=0, description="of sampling; the trainer's log-probabilities use it too")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1: off")
    top_k: int = Field(-1, ge=-1, description="sample among the k likeliest tokens; -1: off")
    tensor_parallel_size: int = Field(1, ge=1, description="ranks of one vLLM replica; must divide the world size")
    expert_parallel: bool = Field(
        False,
        description="ranks of a replica have whole experts each (vLLM's expert parallelism), not a slice of every one",
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of vLLM's weights and KV cache")
    weights: Literal["trained", "fp8", "fp8-emulated"] = Field(
        "trained",
        description="fp8: linear layers in FP8 by blocks of 128 x 128, quantised on the trainer's ranks; takes a GPU "
        "that has it, or a CPU with AMX. fp8-emulated: the same rounded weights in dtype, anywhere: docs/fp8.md",
    )
    kv_cache_gib: float | Literal["auto"] = Field(
        "auto",
        description="KV cache per rank, GiB; auto: what max_num_seqs sequences of the longest prompt and response take,"
        " as far as 95 % of the GPU has room beside all else that `plan` counts, on the CPU 1 at most; never less than "
        "one such sequence takes",
    )
    max_num_seqs: int = Field(
        256, ge=1, description="responses that one replica samples at a time; it draws further prompts as they end"
    )
    max_num_batched_tokens: int = Field(
        20480,
        ge=1,
        description="tokens of one vLLM step, at least max_num_seqs; longer prompts are taken in parts on GPUs, and "
        "raise it on the CPU",
    )
    bucket_mib: int = Field(
        64, ge=1, description="buffers of one bucket of new weights, MiB; a sync holds two, an export sends by it"
    )
    max_log_prob_diff: float | Literal["auto"] | None = Field(
        "auto",
        description="first-step gate: mean |log p(vLLM) - log p(Megatron)| above this stops the run; auto: 0.001 where "
        "both compute in float32, 0.5 with FP8, else 0.1, and no gate with top_p or top_k, which vLLM's counts in; "
        "null: no gate",
    )

    @field_validator("kv_cache_gib", "max_log_prob_diff", mode="wrap")
    @classmethod
    def _number_or_word(
        cls, value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> float | Literal["auto"] | None:
        """One message for all that it may be."""
        try:
            number: float | Literal["auto"] | None = check(value)
        except ValidationError:
            number = 0.0
        if number is not None and number != "auto" and number <= 0:
            if info.field_name == "kv_cache_gib":
                raise PydanticCustomError("size", "must be a finite number above 0, or auto")
            raise PydanticCustomError("bound", "must be a number above 0, auto or null")
        return number

    @property
    def kv_cache_bytes(self) -> int:
        """``kv_cache_gib`` in bytes, where it is a number: ``auto`` is made one by ``planner.ledger.with_kv_cache``."""
        if self.kv_cache_gib == "auto":
            raise ValueError("rollout.kv_cache_gib: auto must be made a number (planner.ledger.with_kv_cache) before")
        return int(self.kv_cache_gib * GIB)

    def log_prob_bound(self, trainer_dtype: str, *, fp8: bool) -> float | None:
        """``max_log_prob_diff`` beside an actor of this dtype, or one that computes in FP8; None: no gate.

        Kernels of one precision differ by 1e-7 in float32, 1e-2 in bfloat16, 0.2 in FP8; other weights by more than 1.
        """
        if self.max_log_prob_diff != "auto":
            return self.max_log_prob_diff
        if self.top_p < 1 or self.top_k > 0:
            return None
        if fp8 or self.weights != "trained":
            return 0.5
        return 1e-3 if self.dtype == trainer_dtype == "float32" else 0.1
