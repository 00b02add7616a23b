"""Which layouts of a job fit, and which of them are likely the fastest: by the same ledger and the same times.

Actor and critic get the same layout. Layouts are tried from the fastest on, by their times; what is proposed has been
planned in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from tempo_megatron.config.check import check_shapes
from tempo_megatron.config.layout import divisors
from tempo_megatron.config.load import flat
from tempo_megatron.config.schema import Config
from tempo_megatron.errors import TempoError
from tempo_megatron.planner.advice import changed
from tempo_megatron.planner.ledger import Ledger, plan_ledger
from tempo_megatron.planner.parameters import Role, RoleLayout
from tempo_megatron.planner.request import PlanRequest
from tempo_megatron.planner.rollout import cache_bytes
from tempo_megatron.planner.state import StateBytes, state_at
from tempo_megatron.planner.work import Lengths, StepWork, step_work

#: Proposals that are made, and candidates that are planned in full for them.
WANTED, MOST_TRIED = 3, 300

_RECOMPUTE = ("none", "selective", "full")
#: From what costs nothing on.
_RESIDENCY: tuple[dict[str, Any], ...] = (
    {"residency.offload": "none", "residency.sleep": False},
    {"residency.offload": "none", "residency.sleep": True},
    {"residency.offload": "optimizer", "residency.sleep": True},
    {"residency.offload": "all", "residency.sleep": True},
)


@dataclass(frozen=True)
class Proposal:
    """``changes``: dotted keys of the configuration; ``different``: those of them that say something else than it does;
    ``ledger`` and ``work``: with all of them.
    """

    changes: dict[str, Any]
    different: dict[str, Any]
    ledger: Ledger
    work: StepWork

    @property
    def lines(self) -> str:
        """YAML to paste."""
        tree: dict[str, Any] = {}
        for key, value in self.different.items():
            *sections, name = key.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
        text: str = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=1000)
        return text


def search(request: PlanRequest, lengths: Lengths) -> list[Proposal]:
    """The best few that fit, the fastest first; none: nothing that was tried fits."""
    return _Search(request, lengths).run()


class _Search:
    def __init__(self, request: PlanRequest, lengths: Lengths) -> None:
        self.request, self.lengths = request, lengths
        self.roles: list[Role] = ["actor"]
        if request.config.critic is not None:
            self.roles.append("critic")
        self._trained: dict[str, dict[str, StateBytes]] = {}
        self._now = dict(flat(request.config.model_dump()))

    def run(self) -> list[Proposal]:
        candidates = sorted(self._timed(), key=lambda pair: pair[0])
        found: list[Proposal] = []
        layouts: set[str] = set()
        for _, changes in candidates[:MOST_TRIED]:
            layout = str({key: value for key, value in changes.items() if ".parallel." in key})
            if layout in layouts:
                continue
            config = changed(self.request.config, changes)
            ledger = plan_ledger(config, self.request.sizes, self.request.cluster)
            if ledger.verdict == "fits":
                layouts.add(layout)
                different = {key: value for key, value in changes.items() if self._now.get(key) != value}
                cache = 0 if ledger.kv is None else ledger.kv.bytes
                found.append(Proposal(changes, different, ledger, self._work(config, ledger.states, cache)))
            if len(found) == WANTED:
                break
        return found

    def _work(self, config: Config, states: dict[str, StateBytes], cache: int) -> StepWork:
        return step_work(config, self.request.sizes, self.request.cluster, states, self.lengths, cache)

    def _timed(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Seconds of a step, of every combination; what trains and what samples have times of their own."""
        samples = self.request.config.stage != "sft"
        rollouts = list(self._rollouts()) if samples else [({}, 0.0)]
        for layout in self._layouts():
            for recompute in _RECOMPUTE:
                trained = layout | {f"{role}.recompute": recompute for role in self.roles}
                for number, residency in enumerate(_RESIDENCY if samples else ({},)):
                    both = trained | residency
                    seconds = self._training_seconds(both)
                    if seconds is not None:
                        for rollout, sampled in rollouts:
                            # of equal ones the plainest
                            yield (seconds + sampled) * (1 + 1e-3 * number), both | rollout

    def _layouts(self) -> Iterator[dict[str, Any]]:
        """Sizes of both roles that are legal, powers of two; tensor ranks stay within a node."""
        request = self.request
        world, near = request.cluster.world_size, request.cluster.ranks_per_node
        shape = request.shapes["actor"]
        longest = self.request.config.data.max_prompt_tokens + self.request.config.data.max_response_tokens
        for tensor in _powers(divisors(near)):
            for stages in _powers(divisors(world // tensor)):
                for context in _powers(divisors(world // tensor // stages)):
                    if context > max(1, longest // 8192):
                        continue
                    for experts in _powers(divisors(shape.experts)) if shape.experts else [1]:
                        sizes = {
                            "tensor_model_parallel_size": tensor,
                            "sequence_parallel": tensor > 1,
                            "pipeline_model_parallel_size": stages,
                            "context_parallel_size": context,
                            "expert_model_parallel_size": experts,
                        }
                        found = {f"{role}.parallel": {**sizes} for role in self.roles}
                        layout = {f"{key}.{name}": size for key, some in found.items() for name, size in some.items()}
                        if self._config(layout) is not None:
                            yield layout

    def _config(self, changes: dict[str, Any]) -> Config | None:
        """None where it is not legal."""
        clean: dict[str, Any] = {}
        for role in self.roles:
            for name in ("virtual_pipeline_model_parallel_size", "expert_tensor_parallel_size"):
                clean[f"{role}.parallel.{name}"] = 1
            for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
                clean[f"{role}.parallel.{name}"] = None
        try:
            config = changed(self.request.config, clean | changes)
            check_shapes(config, self.request.shapes, self.request.cluster.world_size)
        except TempoError:
            return None
        return config

    def _training_seconds(self, changes: dict[str, Any]) -> float | None:
        """None where states alone are more than a card has."""
        config = self._config(changes)
        if config is None:
            return None
        states = self._states(config)
        away = config.residency.offload != "none"
        totals = [state.total for state in states.values()]
        if (max(totals) if away else sum(totals)) > self.request.cluster.card.memory:
            return None
        work = self._work(config, states, 0)
        return sum(phase.seconds for phase in work.phases if not phase.name.startswith(("rollout", "sync")))

    def _states(self, config: Config) -> dict[str, StateBytes]:
        """Of the first stage; made once for a layout."""
        key = config.actor.parallel.model_dump_json()
        if key not in self._trained:
            self._trained[key] = {}
            for role in self.roles:
                settings = config.actor if role == "actor" else config.critic
                assert settings is not None
                layout = RoleLayout(settings.parallel, self.request.cluster.world_size)
                sizes = self.request.sizes[role]
                self._trained[key][role] = state_at(sizes, role, settings, layout, layout.place(0))
        return self._trained[key]

    def _rollouts(self) -> Iterator[tuple[dict[str, Any], float]]:
        for size in _powers(divisors(self.request.cluster.ranks_per_node)):
            changes = {"rollout.tensor_parallel_size": size}
            try:
                config = changed(self.request.config, changes)
                check_shapes(config, self.request.shapes, self.request.cluster.world_size)
            except TempoError:
                continue
            width = self.request.shapes["actor"].expert_intermediate_size
            if width % size:  # vLLM cuts every expert
                continue
            work = self._work(config, self._states(config), self._most_cache(config))
            yield changes, sum(p.seconds for p in work.phases if p.name.startswith(("rollout", "sync")))

    def _most_cache(self, config: Config) -> int:
        """Bytes; of ``auto`` what it would like, for what is left to it is not known before the layout is."""
        data, cluster = config.data, self.request.cluster
        longest = data.max_prompt_tokens + data.max_response_tokens
        sizes = self.request.sizes["actor"]
        return cache_bytes(sizes, config.rollout, longest, cluster.card.memory, on_cpu=cluster.on_cpu)


def _powers(numbers: list[int]) -> list[int]:
    return [n for n in numbers if n & (n - 1) == 0]
