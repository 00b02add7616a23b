"""Small jobs that are walked through, and trained by real ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempo_megatron.config.schema import Config
from tempo_megatron.loop.scale.rows import draw_rows, queue_shares
from tempo_megatron.loop.scale.walk import WALKED, Job
from tempo_megatron.model.held import megatron_holdings
from tests.model.parity_cases import Layout, config_of


@dataclass(frozen=True)
class Case:
    """A job by the names of its family and layouts (``parity_cases.Layout``); the critic's is the actor's if None."""

    ranks: int
    family: str
    layout: str
    critic: str | None = None
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        other = "" if self.critic is None else f", critic {self.critic or 'dp'}"
        return f"{self.ranks} ranks, {self.family}, {self.layout or 'dp'}{other}"


def config_for(case: Case, **changes: Any) -> Config:
    """A TEMPO step of 4 + 4 prompts with 2 responses each, of at most 6 + 10 tokens."""

    def role(layout: Layout) -> dict[str, Any]:
        return {
            "init": "-",
            "dtype": case.dtype,
            "layer_spec": "torch",
            "max_tokens_per_microbatch": 32,
            "parallel": layout.parallel.model_dump(),
            "optimizer": {"distributed": layout.distributed},
        }

    actor, critic = Layout(case.layout), Layout(case.layout if case.critic is None else case.critic)
    data = {"labeled_prompts_per_step": 4, "unlabeled_prompts_per_step": 4}
    settings: dict[str, Any] = {
        "stage": "tempo",
        "output_dir": "-",
        "steps": 1,
        "actor": role(actor),
        "critic": role(critic),
        "data": {"max_prompt_tokens": 6, "max_response_tokens": 10, **data},
        "rollout": {"samples_per_prompt": 2, "max_num_seqs": 2},
        "algorithm": {"estep": {"minibatches": 2}, "mstep": {"minibatches": 2}},
    }
    return Config.model_validate({**settings, **changes})


def job_for(case: Case, folder: Path, *, micro_batches: int = 3, **changes: Any) -> Job:
    """``folder`` gets the model's config.json."""
    config, model = config_for(case, **changes), config_of(case.family, **Layout(case.layout).model_changes)
    model.save_pretrained(folder)
    roles = {"actor": config.actor} | ({} if config.critic is None else {"critic": config.critic})
    rows = {draw: draw_rows(config, draw) for draw in (WALKED, "long tail")}
    replicas = case.ranks // config.rollout.tensor_parallel_size
    return Job(
        config=config,
        world_size=case.ranks,
        hf_dirs=dict.fromkeys(roles, folder),
        holdings={role: megatron_holdings(model, role, c.parallel, case.ranks) for role, c in roles.items()},
        rows=rows,
        shares={draw: queue_shares(some, replicas, config.rollout.max_num_seqs) for draw, some in rows.items()},
        micro_batches=micro_batches,
    )
