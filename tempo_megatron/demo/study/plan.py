"""What the study runs: arms (configurations) over seeds, each from a base model that arms share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

#: Key of ``configs/study``: arms without one of their own are this file with overrides.
TEMPO = "tempo"
#: Seeds on which the settings of the demo and of the study were chosen.
SEEDS_OF_CHOICE = range(6)


@dataclass(frozen=True)
class Base:
    """A starting point: the demo's cold start, then PPO on D_L with these settings (``configs/demo/rlvr.yaml``)."""

    name: str = "base"
    rlvr: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One configuration.

    Attributes:
        name: of its folders; the same name is the same run wherever it occurs.
        title: in tables and pictures.
        config: file in ``configs/study``.
        overrides: settings that win over the file.
    """

    name: str
    title: str
    config: str = TEMPO
    overrides: Mapping[str, object] = field(default_factory=dict)
    base: Base = Base()


@dataclass(frozen=True)
class Part:
    """A question and the arms that answer it.

    Attributes:
        seeds: how many, unless told otherwise.
        chosen_on: seeds on which its settings were chosen: no fresh evidence.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    seeds: int
    chosen_on: Collection[int] = SEEDS_OF_CHOICE


TEMPO_ARM = Arm("tempo", "TEMPO")

CLAIMS = Part(
    "claims",
    "Do the paper's claims hold on this task?",
    (
        TEMPO_ARM,
        Arm("frozen", "frozen critic", "frozen"),
        Arm("ttrl", "TTRL", "ttrl"),
        Arm("empo", "EMPO", "empo"),
        Arm("ppo", "PPO on D_L", "ppo"),
        Arm("oracle", "oracle", "oracle"),
    ),
    seeds=5,
)

GUARD = Part(
    "guard",
    "Does the guard stop the collapses of the paper's rows?",
    (
        Arm("paper", "paper, no guard", "paper"),
        Arm("paper-guarded", "paper, guarded", "paper-guarded"),
    ),
    seeds=10,
    # which checkpoints the guard takes for good was settled after earlier runs of these three
    chosen_on=(*SEEDS_OF_CHOICE, 12, 13, 14),
)

#: What is compared here is to show, so nothing may hold it; ends matter more than curves, which cost time.
_UNGUARDED = {"algorithm.guard.enabled": False, "evaluation.every": 45}


def _ablation(name: str, title: str, overrides: Mapping[str, object]) -> Arm:
    return Arm(name, title, overrides={**overrides, **_UNGUARDED})


ABLATIONS = Part(
    "ablations",
    "What do rows, frequency and order of the E-step and the size of D_L change?",
    (
        TEMPO_ARM,
        _ablation("rows-unlabeled", "policy trained on D_U alone", {"algorithm.mstep.rows": "unlabeled"}),
        *(_ablation(f"every-{k}", f"E-step every {k}", {"algorithm.estep.every": k}) for k in (2, 4, 8)),
        # beyond the run's length: while the gate is closed each step has an E-step whatever this says
        _ablation("every-start", "E-steps before the gate opens alone", {"algorithm.estep.every": 1000}),
        _ablation("every-never", "no E-step", {"algorithm.estep.every": None, "algorithm.gate.enabled": False}),
        _ablation("order-after", "values before the E-step", {"algorithm.estep.order": "after_values"}),
        *(_ablation(f"labeled-{n}", f"D_L of {n}", {"data.labeled_limit": n}) for n in (16, 64)),
    ),
    seeds=3,
)

#: Many short runs, of which the ends are compared.
_ENDS = {"algorithm.guard.enabled": False, "steps": 60, "evaluation.every": None}
#: Critic-only steps in place of the gate: with a saturated D_L there is nothing by which a gate could open.
_WARM_UP = {
    "algorithm.gate.auroc": 0.501,
    "algorithm.gate.close_below": 0.5,
    "algorithm.gate.min_per_class": 1,
    "algorithm.gate.min_steps": 20,
    **_ENDS,
}

_BASES = (
    Base(),
    Base("rlvr-60", {"steps": 60}),
    Base("weak-critic", {"critic.optimizer.lr": 2e-5}),
    Base("weak-60", {"steps": 60, "critic.optimizer.lr": 2e-5}),
    Base("strong-critic", {"critic.optimizer.lr": 1e-3, "algorithm.estep.updates": 3}),
    Base("strong-60", {"steps": 60, "critic.optimizer.lr": 1e-3, "algorithm.estep.updates": 3}),
)

RECALIBRATION = Part(
    "recalibration",
    "When does recalibration pay, over the critic's quality and D_L's saturation?",
    tuple(
        Arm(f"{name}-{base.name}", f"{title}, {base.name}", config, overrides, base)
        for base in _BASES
        for name, title, config, overrides in (
            ("recalibrated", "recalibrated", TEMPO, _WARM_UP),
            ("frozen", "frozen", "frozen", _ENDS),
        )
    ),
    seeds=3,
)

_BF16: dict[str, object] = {
    "actor.dtype": "bfloat16",
    "critic.dtype": "bfloat16",
    "rollout.dtype": "bfloat16",
    "rollout.max_log_prob_diff": "auto",
}
_FP8_ROLLOUT: dict[str, object] = {"rollout.weights": "fp8-emulated"}
#: The recipe of FP8 training runs on Hopper; both layers, which as first and last would stay out.
_FP8_TRAINING: dict[str, object] = {
    f"{role}.fp8": {"recipe": "blockwise", "emulated": True, "first_layers_out": 0, "last_layers_out": 0}
    for role in ("actor", "critic")
}

PRECISION = Part(
    "precision",
    "Does TEMPO survive bfloat16 and FP8?",
    (
        TEMPO_ARM,
        Arm("bf16", "bfloat16", overrides=_BF16),
        Arm("fp8-rollout", "FP8 rollout", overrides=_BF16 | _FP8_ROLLOUT),
        Arm("fp8-training", "FP8 training", overrides=_BF16 | _FP8_TRAINING),
        Arm("fp8-both", "FP8 both", overrides=_BF16 | _FP8_ROLLOUT | _FP8_TRAINING),
    ),
    seeds=5,
)

PARTS: Mapping[str, Part] = {part.name: part for part in (CLAIMS, GUARD, ABLATIONS, RECALIBRATION, PRECISION)}
