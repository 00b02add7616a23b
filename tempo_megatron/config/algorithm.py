"""Settings of what is learnt from rollouts: E-step, M-step, rewards, filter, gate and guard, and their presets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from tempo_megatron.config.section import Section


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
