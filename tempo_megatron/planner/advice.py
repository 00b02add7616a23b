"""What to change in a configuration that does not fit (or barely): every suggestion is planned before it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tempo_megatron.config.check import check_shapes
from tempo_megatron.config.layout import ModelShape
from tempo_megatron.config.schema import Config
from tempo_megatron.errors import TempoError
from tempo_megatron.planner.ledger import Ledger, plan_ledger
from tempo_megatron.planner.range import Bytes
from tempo_megatron.planner.request import PlanRequest


@dataclass(frozen=True)
class Suggestion:
    """Settings, the price of them in words, and what the fullest rank would then hold."""

    changes: dict[str, Any]
    price: str
    total: Bytes
    verdict: str

    @property
    def words(self) -> str:
        """As on the command line."""
        return " ".join(f"{key}={_yaml(value)}" for key, value in self.changes.items())


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with dotted keys set; TempoError for what the schema refuses."""
    values = config.model_dump()
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[name] = value
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise TempoError(f"{', '.join(changes)}: {error.errors()[0]['msg']}") from None


def suggestions(request: PlanRequest, ledger: Ledger) -> list[Suggestion]:
    """In the order of what they cost; those that make the fullest phase smaller, one after the other, until it fits.

    Each stands for itself but for the last, which is all of the first ones together where no single one is enough.
    """
    found: list[Suggestion] = []
    together: dict[str, Any] = {}
    for changes, price in _candidates(request, ledger):
        made = _tried(request, changes, price)
        if made is None or made.total.high >= ledger.fullest.total.high:
            continue
        found.append(made)
        together |= changes
        if made.verdict != "fits" and len(together) > len(changes):
            both = _tried(request, together, "all of these together")
            if both is not None and both.verdict == "fits" and all(s.verdict != "fits" for s in found):
                return [*found, both]
    return found


def _tried(request: PlanRequest, changes: dict[str, Any], price: str) -> Suggestion | None:
    """None where it is not legal."""
    try:
        config = changed(request.config, changes)
        check_shapes(config, request.shapes, request.cluster.world_size)
    except TempoError:
        return None
    ledger = plan_ledger(config, request.sizes, request.cluster)
    return Suggestion(changes, price, ledger.fullest.total, ledger.verdict)


def _candidates(request: PlanRequest, ledger: Ledger) -> Iterator[tuple[dict[str, Any], str]]:
    config = request.config
    roles = ["actor"] + ["critic"] * (config.critic is not None)
    settings = {role: getattr(config, role) for role in roles}
    if config.stage != "sft":
        if not config.residency.sleep:
            yield {"residency.sleep": True}, "vLLM's weights come anew in every step"
        if ledger.kv is not None and ledger.kv.sequences > config.rollout.max_num_seqs:
            size = ledger.kv.bytes_for(config.rollout.max_num_seqs) / 2**30
            yield {"rollout.kv_cache_gib": round(size, 2)}, "nothing: more is not used"
        for offload in ("optimizer", "all"):
            if config.residency.offload == "none" or (offload, config.residency.offload) == ("all", "optimizer"):
                yield {"residency.offload": offload}, "copies to the host and back in every step"
    for level, price in (("selective", "MLPs are computed again"), ("full", "layers are computed again")):
        keys = {f"{role}.recompute": level for role in roles if _less(settings[role].recompute, level)}
        if keys:
            yield keys, price
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    tokens = {
        f"{role}.max_tokens_per_microbatch": max(longest, settings[role].max_tokens_per_microbatch // 2)
        for role in roles
        if settings[role].max_tokens_per_microbatch > longest
    }
    if tokens:
        yield tokens, "smaller products, more micro-batches"
    yield from _smaller_cache(ledger)
    yield from _more_parallel(config, roles, request.shapes)


def _less(now: str, then: str) -> bool:
    order = ("none", "selective", "full")
    return order.index(now) < order.index(then)


def _smaller_cache(ledger: Ledger) -> Iterator[tuple[dict[str, Any], str]]:
    if ledger.kv is not None and ledger.kv.sequences > 2:
        half = round(ledger.kv.bytes / 2**31, 2)
        yield {"rollout.kv_cache_gib": half}, "fewer responses at a time"


def _more_parallel(
    config: Config, roles: list[str], shapes: Mapping[str, ModelShape]
) -> Iterator[tuple[dict[str, Any], str]]:
    for role in roles:
        parallel = getattr(config, role).parallel
        key = f"{role}.parallel"
        more = {f"{key}.tensor_model_parallel_size": 2 * parallel.tensor_model_parallel_size}
        yield more | {f"{key}.sequence_parallel": True}, "more communication inside of layers"
        more = {f"{key}.pipeline_model_parallel_size": 2 * parallel.pipeline_model_parallel_size}
        yield more, "stages wait for each other"
        if shapes[role].experts:
            more = {f"{key}.expert_model_parallel_size": 2 * parallel.expert_model_parallel_size}
            yield more, "tokens go further to their experts"
    if config.stage != "sft":
        size = 2 * config.rollout.tensor_parallel_size
        yield {"rollout.tensor_parallel_size": size}, "fewer replicas, more communication in sampling"
