"""The typed tree of all settings.  One YAML file fills it; every key is read by something.

Pydantic in strict mode: an unknown key or a wrong type is refused (see ``config.load`` for how that is
told).  Cross-field rules that need the model's own numbers (heads, layers) live in ``config.check``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from tempo_megatron.config.algorithm import AlgorithmConfig
from tempo_megatron.config.fp8 import Fp8Config
from tempo_megatron.config.job import LaunchConfig, SlurmConfig, WatchdogConfig
from tempo_megatron.config.methods import METHODS, describe_stages
from tempo_megatron.config.rollout import RolloutConfig
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
