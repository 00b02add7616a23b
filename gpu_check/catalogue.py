"""The items, the cheapest first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One process.

    Attributes:
        name: as ``--items`` takes it.
        run: ``"module:function"``, called with a ``gpu_check.check.Check`` in its own process.
        about: what it shows, in a line.
        takes_s: about what it takes on a GPU; guessed until it has run on one.
        limit_s: after which it is ended.
    """

    name: str
    run: str
    about: str
    takes_s: float
    limit_s: float


ITEMS = (
    Item("rates", "gpu_check.items.rates:run", "what the device reaches: matrix products, copies", 15, 120),
    Item("fp8_speed", "gpu_check.items.fp8:speed", "a dense layer in FP8 against bfloat16", 20, 120),
    Item("imports", "gpu_check.items.imports:run", "packages, drivers, every module of ours", 25, 240),
    Item("kernels", "gpu_check.items.kernels:run", "linear, norm, rope, attention against float64", 30, 240),
    Item("fp8", "gpu_check.items.fp8:run", "FP8 codes, scales and a linear layer against the oracle", 30, 180),
    Item("peaks", "gpu_check.items.peaks:run", "what forward and backward allocate, as planned", 35, 240),
    Item("train_speed", "gpu_check.items.train_speed:run", "an optimizer step of a few layers of an 8B model", 45, 240),
    Item("models", "gpu_check.items.models:run", "families and roles against transformers", 60, 400),
    Item("ranks", "gpu_check.items.ranks:run", "models on two ranks, collectives", 60, 300),
    Item("rollout", "gpu_check.items.rollout:run", "vLLM beside a trainer that fills the card, two reloads", 70, 300),
    Item("rollout_fp8", "gpu_check.items.rollout:fp8", "vLLM that holds FP8, two reloads", 70, 300),
    Item("sync_speed", "gpu_check.items.speed:sync", "new weights to vLLM against a copy of the same bytes", 80, 300),
    Item("demo", "gpu_check.items.demo:run", "EM steps, and a run that goes on", 90, 400),
    Item("residency", "gpu_check.items.residency:run", "offload and sleep, peaks as planned", 90, 400),
    Item("rollout_speed", "gpu_check.items.speed:rollout", "sampling against vllm.LLM with equal settings", 100, 400),
    Item("rollout_families", "gpu_check.items.rollout:families", "vLLM with each other family, as rollout", 200, 500),
)  # fmt: skip
