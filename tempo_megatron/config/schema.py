"""The typed tree of all settings.  One YAML file fills it; every key is read by something.

Pydantic in strict mode: an unknown key or a wrong type is refused (see ``config.load`` for how that is
told).  Cross-field rules that need the model's own numbers (heads, layers) live in ``config.check``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tempo_megatron.config.fp8 import Fp8Config
from tempo_megatron.config.job import LaunchConfig, SlurmConfig, WatchdogConfig
from tempo_megatron.config.methods import METHODS, describe_stages
from tempo_megatron.config.section import Section
from tempo_megatron.locate import Phase

if TYPE_CHECKING:
    Stage = str
else:
    Stage = Literal[("sft", *METHODS)]  # a method is a row there, and so a stage here


class ParallelConfig(Section):
    """Megatron layout of one role; data parallelism is what remains of the world."""

    tensor_model_parallel_size: int = Field(
        1,
        ge=1,
        description="ranks that share each layer; must divide the heads and the MLP width; more than KV heads: several "
        "use the same one",
    )
    pipeline_model_parallel_size: int = Field(
        1, ge=1, description="pipeline stages; where they do not divide the layers, some hold one layer more"
    )
    num_layers_in_first_pipeline_stage: int | None = Field(
        None, ge=1, description="layers of the first stage; the others share the rest as evenly as can be"
    )
    num_layers_in_last_pipeline_stage: int | None = Field(
        None, ge=1, description="layers of the last stage; the others share the rest as evenly as can be"
    )
    virtual_pipeline_model_parallel_size: int = Field(
        1, ge=1, description="chunks of layers per stage (interleaved schedule); 1: one run of layers per stage"
    )
    context_parallel_size: int = Field(1, ge=1, description="ranks that share the tokens of each sequence")
    expert_model_parallel_size: int = Field(
        1, ge=1, description="ranks that share the experts of a layer; must divide them. Taken from TP, CP and DP"
    )
    expert_tensor_parallel_size: int = Field(1, ge=1, description="ranks that share each single expert")
    sequence_parallel: bool = Field(False, description="split norms and residuals by token over the TP ranks")

    @model_validator(mode="after")
    def _consistent(self) -> ParallelConfig:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel: true needs tensor_model_parallel_size > 1")
        of_stages = {
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline_model_parallel_size > 1,
            "num_layers_in_first_pipeline_stage": self.num_layers_in_first_pipeline_stage is not None,
            "num_layers_in_last_pipeline_stage": self.num_layers_in_last_pipeline_stage is not None,
        }
        for name, given in of_stages.items():
            if given and self.pipeline_model_parallel_size == 1:
                raise ValueError(f"{name}: {getattr(self, name)} needs pipeline_model_parallel_size > 1")
        return self

    def megatron_sizes(self) -> dict[str, int | None]:
        """The sizes by the names that Megatron's groups and its TransformerConfig both know them by."""
        layers = {"num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"}
        sizes: dict[str, int | None] = self.model_dump(exclude={"sequence_parallel", *layers})
        if self.virtual_pipeline_model_parallel_size == 1:
            sizes["virtual_pipeline_model_parallel_size"] = None
        return sizes

    @property
    def model_parallel_size(self) -> int:
        """Ranks of one replica of the dense layers."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_parallel_size(self) -> int:
        """Ranks of one replica of the experts."""
        return self.expert_tensor_parallel_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size


class OptimizerConfig(Section):
    """AdamW on fp32 masters; ``lr`` 0 freezes the role (the frozen-critic ablation)."""

    lr: float = Field(1e-6, ge=0, description="learning rate after the warm-up")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the decay; unused when constant")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay rates of the two moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled; not applied to norms and biases")
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up from 0")
    decay: Literal["constant", "linear", "cosine"] = Field("constant", description="schedule after the warm-up")
    decay_steps: int | None = Field(None, ge=1, description="optimizer steps until min_lr; needed unless constant")
    distributed: bool = Field(True, description="Megatron's distributed optimizer (states sharded over DP)")
    overlap_grad_reduce: bool = Field(
        False, description="reduce gradients over DP while the last backward makes the others; not tried on GPUs yet"
    )

    @model_validator(mode="before")
    @classmethod
    def _lists_are_pairs(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            values = {**values, "betas": tuple(values["betas"])}
        return values

    @model_validator(mode="after")
    def _decay_needs_steps(self) -> OptimizerConfig:
        if self.decay != "constant" and self.decay_steps is None:
            raise ValueError(f"decay: {self.decay} needs decay_steps (optimizer steps until min_lr)")
        if self.decay != "constant" and self.min_lr > self.lr:
            raise ValueError(f"min_lr: {self.min_lr} is above lr: {self.lr}, from which the rate decays to it")
        return self


class RoleConfig(Section):
    """One trained model: the actor or the critic."""

    init: str = Field(description="HF folder, one of our checkpoints, or a run folder (its newest checkpoint)")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="of weights and activations; the optimizer's masters are float32"
    )
    layer_spec: Literal["auto", "torch", "te"] = Field(
        "auto",
        description="auto: te where installed on a GPU, but for float32, which te multiplies in TF32; else torch",
    )
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    max_tokens_per_microbatch: int = Field(
        20480, ge=1, description="token budget of one packed micro-batch, of all its context ranks together"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations that the backward makes again: selective: of the MLPs or experts; full: of whole "
        "layers, of which only the input is kept. true is full",
    )
    fp8: Fp8Config = Fp8Config()

    @field_validator("recompute", mode="before")
    @classmethod
    def _all_or_nothing(cls, value: Any) -> Any:
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class CriticConfig(RoleConfig):
    head: Literal["regression", "sigmoid"] = Field(
        "regression",
        description="regression: linear head, squared error. sigmoid: V = sigmoid(head), binary cross-entropy",
    )
    init_head: bool = Field(False, description="make a fresh value head when the checkpoint is a policy without one")
    initial_value: float = Field(0.5, description="V of a fresh head, everywhere (its weight is 0)")

    @model_validator(mode="after")
    def _probability(self) -> CriticConfig:
        if self.head == "sigmoid" and not 0 < self.initial_value < 1:
            raise ValueError(f"initial_value: {self.initial_value} must lie between 0 and 1 with head: sigmoid")
        return self

    @property
    def initial_bias(self) -> float:
        """Bias of a fresh head."""
        v = self.initial_value
        return math.log(v / (1 - v)) if self.head == "sigmoid" else v


class DataConfig(Section):
    train_files: list[str] = Field(
        [], description="prompt parquet (plain or verl schema); sft: prompt+response parquet"
    )
    labeled_prompts_per_step: int = Field(0, ge=0, description="D_L prompts of one step")
    unlabeled_prompts_per_step: int = Field(0, ge=0, description="D_U prompts of one step; 0 in methods on D_L alone")
    labeled_limit: int | None = Field(None, ge=1, description="first so many labelled records only; null: all")
    oracle_files: list[str] = Field(
        [],
        description="stage oracle only: prompt parquet with the answers of the unlabelled records",
    )
    answer_types: dict[str, str] = Field(
        {},
        description="source of records -> kind of answer (docs/verifiers.md), over what its files state; "
        "by default a source whose files state none gets the kind that its labelled answers have, told in the log",
    )
    chat_template_kwargs: dict[str, bool | int | float | str | None] = Field(
        {}, description="variables of the chat template, such as enable_thinking: false; for training and evaluation"
    )
    max_prompt_tokens: int = Field(2048, ge=1, description="a longer prompt is refused")
    max_response_tokens: int = Field(16384, ge=1, description="a response is cut off there and counts as truncated")
    sft_batch_size: int = Field(256, ge=1, description="sequences per optimizer step of the sft stage")


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
    weights: Literal["trained", "fp8-emulated"] = Field(
        "trained", description="fp8-emulated: linear layers' rounded to FP8 by blocks and back: docs/fp8.md"
    )
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache per rank, GiB")
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

    @field_validator("max_log_prob_diff", mode="wrap")
    @classmethod
    def _a_bound(cls, value: Any, check: ValidatorFunctionWrapHandler) -> float | Literal["auto"] | None:
        """One message for all that it may be."""
        try:
            bound: float | Literal["auto"] | None = check(value)
        except ValidationError:
            bound = 0.0
        if bound is not None and bound != "auto" and bound <= 0:
            raise PydanticCustomError("bound", "must be a number above 0, auto or null")
        return bound

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


class EStepConfig(Section):
    order: Literal["before", "after_values"] = Field(
        "before", description="before: update, then take the M-step's values; after_values: take them first"
    )
    every: int | None = Field(1, ge=1, description="E-step on every k-th step; null: never")
    updates: int = Field(1, ge=1, description="passes over each step's labelled rows")
    minibatches: int = Field(4, ge=1, description="optimizer steps of one pass (paper: 256 prompts in 4)")
    value_clip: float | None = Field(None, gt=0, description="clip on the shift of a sequence's mean value; null: off")
    loss_agg: Literal["token-mean", "seq-mean-token-mean"] = Field(
        "seq-mean-token-mean", description="mean over all tokens, or over the token means of the sequences"
    )


class CorrectionConfig(Section):
    """What is done about rollouts whose engine gives other probabilities than the trainer."""

    weights: Literal["none", "token", "sequence"] = Field(
        "none", description="truncated importance sampling by the ratio of each token, or of the whole response"
    )
    cap: float = Field(2.0, ge=1, description="a weight above this is cut to it")
    mask_level: Literal["none", "token", "sequence"] = Field(
        "none", description="leave out tokens by their ratio, or responses by their ratio per token (geometric mean)"
    )
    mask_low: float = Field(0.5, gt=0, le=1, description="a ratio below this is masked")
    mask_high: float = Field(2.0, ge=1, description="a ratio above this is masked")


class MStepConfig(Section):
    rows: Literal["unlabeled", "all"] = Field("all", description="rows that train the actor where D_U is drawn")
    estimator: Literal["token", "group"] | None = Field(
        None,
        description="token: R - V of each state; group: R against the samples of its prompt. "
        "null: token where there is a critic. tempo may have either (group: the released code's `em`)",
    )
    minibatches: int = Field(4, ge=1, description="optimizer steps of one pass (paper: 256 prompts in 4)")
    loss: Literal["gspo", "ppo"] = Field(
        "gspo", description="ratio of the whole sequence (gspo) or of each token (ppo)"
    )
    clip_low: float = Field(3e-4, gt=0, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(5e-4, gt=0, description="the ratio is clipped above at 1 + clip_high")
    dual_clip: float | None = Field(None, gt=1, description="PPO dual clip c for negative advantages")
    loss_agg: Literal["token-mean", "seq-mean-token-mean"] = Field(
        "seq-mean-token-mean", description="mean over all tokens, or over the token means of the sequences"
    )
    terminal_value: Literal["pre_last", "post_last"] = Field(
        "post_last", description="read before or after the last token; post_last is also a target of the E-step"
    )
    clamp_terminal: bool = Field(True, description="clamp the terminal value of unlabelled rows to [0, 1]")
    advantage: Literal["whiten", "scale", "none"] = Field(
        "whiten",
        description="estimator token, over the policy batch's tokens: mean 0 and variance 1; mean square 1; as it is. "
        "group: divided by the group's standard deviation (whiten) or not (none)",
    )
    correction: CorrectionConfig = CorrectionConfig()

    @model_validator(mode="after")
    def _dual_clip_is_ppos(self) -> MStepConfig:
        if self.dual_clip is not None and self.loss != "ppo":
            raise ValueError(
                f"dual_clip: {self.dual_clip} has no effect with loss: {self.loss}; use loss: ppo or drop it"
            )
        return self


class VoteConfig(Section):
    """TTRL: the majority of a prompt's samples is its label."""

    ties: Literal["none", "first"] = Field(
        "none", description="several largest clusters: nobody wins and nothing is learnt, or the one seen first wins"
    )


class EntropyConfig(Section):
    """EMPO: the reward is the share of samples that agree. Entropies are fractions of ln(samples)."""

    min_entropy: float = Field(0.0, ge=0, le=1, description="prompts whose answers vary less have reward 0")
    max_entropy: float = Field(
        1.0, gt=0, le=1, description="prompts whose answers vary as much or more have reward 0; 1: all different"
    )


class FilterConfig(Section):
    """Drop labelled prompts whose samples are all right or all wrong; top up from the sampler (DAPO's sampling)."""

    enabled: bool = Field(False, description="top up until there are enough labelled prompts with mixed outcomes")
    apply_to_actor: bool = Field(True, description="keep the dropped rows from the actor")
    apply_to_critic: bool = Field(False, description="keep the dropped rows from the critic")
    max_rounds: int = Field(10, ge=1, description="generation rounds per step before giving up")


class GateConfig(Section):
    """Critic-only E-steps until the terminal values rank fresh labelled rollouts well enough.

    Only in methods whose critic rewards D_U (tempo).
    """

    enabled: bool = Field(True, description="hold M-steps back until the gate is open")
    auroc: float = Field(
        0.95, gt=0.5, le=1, description="a moving average of the AUROC at or above this opens the gate"
    )
    close_below: float = Field(0.8, ge=0.5, le=1, description="a moving average below this closes the gate again")
    smoothing: float = Field(0.7, ge=0, lt=1, description="weight of the past in the moving average")
    min_per_class: int = Field(
        16, ge=1, description="right and wrong responses that an AUROC must rest on to count (fewer: too noisy)"
    )
    min_steps: int = Field(10, ge=0, description="E-steps since it closed before it may open")
    max_steps: int = Field(200, ge=1, description="critic-only steps in a row before the run stops with an error")

    @model_validator(mode="after")
    def _hysteresis(self) -> GateConfig:
        if self.close_below > self.auroc:
            raise ValueError(f"close_below: {self.close_below} must not be above auroc: {self.auroc}")
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps: {self.min_steps} must not be above max_steps: {self.max_steps}")
        return self


class GuardConfig(Section):
    """Watches the fresh labelled rollouts of every step against a collapse. Acts where D_L and D_U are drawn."""

    enabled: bool = Field(False, description="hold or take back M-steps when a watch is beyond its bound")
    action: Literal["hold", "rollback"] = Field(
        "hold",
        description="hold: no M-step (E-steps go on) until all is within bounds. rollback: back to the last good "
        "checkpoint, further back each time, with a smaller actor step",
    )
    min_accuracy: float | None = Field(
        0.8, gt=0, le=1, description="accuracy on labelled rollouts, as a fraction of its start; null: not watched"
    )
    min_readable: float | None = Field(
        0.8, gt=0, le=1, description="fraction of labelled responses with an answer, as a fraction of its start"
    )
    max_truncated: float | None = Field(
        0.2, gt=0, le=1, description="rise of the fraction of truncated responses above its start"
    )
    max_overclaim: float | None = Field(
        0.2, gt=0, le=1, description="terminal value minus accuracy, labelled rollouts (methods with a critic)"
    )
    min_entropy: float | None = Field(None, gt=0, le=1, description="entropy of the policy, as a fraction of its start")
    max_entropy: float | None = Field(3.0, gt=1, description="entropy of the policy, as a multiple of its start")
    start_steps: int = Field(5, ge=1, description="steps whose mean is the start")
    smoothing: float = Field(0.7, ge=0, lt=1, description="weight of the past in the moving averages")
    max_hold: int = Field(20, ge=1, description="steps held in a row after which the run ends early")
    lr_factor: float = Field(0.5, gt=0, le=1, description="the actor's learning rate is multiplied by it at a rollback")
    max_rollbacks: int = Field(3, ge=0, description="rollbacks of one run; one more ends it, at a good checkpoint")


#: What each preset changes; explicit keys win over it.  See docs/algorithm.md for the sources.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "estep": {"order": "before"},
        "mstep": {"rows": "unlabeled", "terminal_value": "post_last", "clamp_terminal": True},
        "filter": {"enabled": False},
        "gate": {"enabled": False},
    },
    "reference": {
        # eps_v 0.1 on the reference's +-1 targets is 0.05 on {0,1}
        "estep": {"order": "after_values", "value_clip": 0.05},
        "mstep": {"rows": "all", "terminal_value": "pre_last", "clamp_terminal": False},
        "filter": {"enabled": True, "apply_to_critic": True},
        "gate": {"enabled": False},
    },
    "anchored": {
        "estep": {"order": "before"},
        "mstep": {"rows": "all", "terminal_value": "post_last", "clamp_terminal": True},
        "filter": {"enabled": False},
        "gate": {"enabled": True},
        "guard": {"enabled": True},
    },
}


class LengthPenaltyConfig(Section):
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13); `null`, the default: none.

    Up to `data.max_response_tokens - buffer_tokens` tokens it is 0; from there it falls linearly to `-coefficient`.
    """

    coefficient: float = Field(1.0, gt=0, description="the reward that a response of full length loses")
    buffer_tokens: int = Field(4096, ge=1, description="tokens over which it falls; at most data.max_response_tokens")


class RewardTermsConfig(Section):
    """What is added to the reward of every row of the M-step, in every method."""

    length_penalty: LengthPenaltyConfig | None = None


class AlgorithmConfig(Section):
    preset: Literal["anchored", "paper", "reference"] = Field(
        "anchored", description="fills in keys of the sections below; explicit keys win over it"
    )
    estep: EStepConfig = EStepConfig()
    mstep: MStepConfig = MStepConfig()
    reward_terms: RewardTermsConfig = RewardTermsConfig()
    vote: VoteConfig = VoteConfig()
    entropy: EntropyConfig = EntropyConfig()
    filter: FilterConfig = FilterConfig()
    gate: GateConfig = GateConfig()
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        name = values.get("preset", "anchored") if isinstance(values, dict) else None
        preset = PRESETS.get(name) if isinstance(name, str) else None
        if preset is None:
            return values  # a wrong name is reported by the field itself
        merged = dict(values)
        for section, changes in preset.items():
            given = values.get(section, {})
            merged[section] = {**changes, **given} if isinstance(given, dict) else given
        return merged


class JudgeConfig(Section):
    """An OpenAI-compatible endpoint that compares answers (``answer_type`` judge); off unless both names are given."""

    base_url: str | None = Field(None, description="such as http://host:8000/v1; /chat/completions is asked there")
    model: str | None = Field(None, description="the model's name at that endpoint")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable with the key; unset: no key is sent")
    timeout_s: float = Field(60.0, gt=0, description="longest wait for one reply, seconds")
    retries: int = Field(2, ge=0, description="further attempts after a timeout, a refused connection, 429 or 5xx")
    max_tokens: int = Field(2048, ge=1, description="of one reply, the judge's own reasoning included")

    @model_validator(mode="after")
    def _both_or_none(self) -> JudgeConfig:
        if (self.base_url is None) != (self.model is None):
            raise ValueError(f"base_url: {self.base_url} and model: {self.model} must be given together")
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url: {self.base_url} must start with http:// or https://")
        return self


class VerifierConfig(Section):
    """The processes that check answers; docs/verifiers.md has the kinds of answer."""

    workers: int = Field(
        2,
        ge=1,
        description="processes on each node, at least one for each vLLM replica that begins there; more of them let a "
        "judge answer in parallel",
    )
    timeout_s: float = Field(5.0, gt=0, description="longest time for one answer, seconds; then it is unverified")
    memory_limit_mib: int = Field(4096, ge=256, description="address space of one worker, MiB")
    judge: JudgeConfig = JudgeConfig()


class EvalSet(Section):
    name: str = Field(description="as in the metric keys eval/<name>/...")
    files: list[str] = Field(description="prompt parquet; every row needs an answer")
    samples_per_prompt: int = Field(16, ge=1, description="responses to each prompt, at least evaluation.pass_k")
    limit: int | None = Field(None, ge=1, description="first so many prompts only")
    trained_on: bool = Field(False, description="its prompts are also D_U: reported apart from held-out sets")


class EvaluationConfig(Section):
    sets: list[EvalSet] = Field([], description="what is evaluated (stage sft evaluates nothing)")
    every: int | None = Field(None, ge=1, description="policy updates between evaluations; null: at start and end only")
    at_start: bool = Field(True, description="before the first step of a run that is not resumed")
    at_end: bool = Field(True, description="after the last step")
    pass_k: int = Field(8, ge=1, description="the k of pass@k, maj@k and distinct@k")

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluationConfig:
        for s in self.sets:
            if s.samples_per_prompt < self.pass_k:
                raise ValueError(
                    f"pass_k: {self.pass_k} needs as many samples, but set {s.name} has samples_per_prompt: "
                    f"{s.samples_per_prompt}"
                )
        return self


class CheckpointConfig(Section):
    every: int | None = Field(None, ge=1, description="steps between checkpoints; null: only at the end")
    phases: list[Phase] = Field(
        [], description="save within every step too, after these of its phases; not in stage sft, which has none"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    asynchronous: bool = Field(
        True,
        description="training goes on while a checkpoint is written from a copy in host memory; false: it waits, and "
        "the copy's memory is not needed",
    )
    export_hf: bool = Field(False, description="also write HF folders of both roles at the end")


class TelemetryConfig(Section):
    tensorboard: bool = Field(False, description="also write output_dir/tensorboard")
    wandb: Literal["off", "offline", "online"] = Field("off", description="also log to wandb; offline needs no account")
    wandb_project: str = Field("tempo_megatron", description="project at wandb")
    logged_rollouts: int = Field(4, ge=0, description="rollouts with token values kept per evaluation for the report")


class ResidencyConfig(Section):
    """What leaves the device while others work; what comes out is the same. By default all stays: the fastest, if it
    fits.
    """

    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="of actor and critic, outside their own phases. optimizer: gradient buffers are released, "
        "optimizer states and float32 masters go to host memory (without a GPU: to a file in output_dir); all: "
        "weights go too",
    )
    sleep: bool = Field(
        False,
        description="vLLM's weights and KV cache are released while actor or critic work; the weights come anew from "
        "the actor",
    )


class Config(Section):
    stage: Stage = Field(description=describe_stages())
    output_dir: str = Field(description="everything the run writes: metrics.jsonl, checkpoints/, ...")
    seed: int = Field(0, ge=0, lt=2**32, description="of data order, samples and initialisation")
    steps: int = Field(ge=1, description="optimizer steps (sft) or policy updates (all others)")
    resume: str = Field(
        "auto", description="auto: newest whole checkpoint of output_dir; never; or a checkpoint folder"
    )
    resume_with_changes: bool | list[str] = Field(
        False,
        description="settings, or sections, that may differ from those of the checkpoint although they change what is "
        "trained ([rollout.temperature, algorithm]); true: any; false: none",
    )
    actor: RoleConfig
    critic: CriticConfig | None = None
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    verifier: VerifierConfig = VerifierConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    residency: ResidencyConfig = ResidencyConfig()
    launch: LaunchConfig = LaunchConfig()
    slurm: SlurmConfig = SlurmConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
