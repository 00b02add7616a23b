"""A question to the planner, from the command line's words: a configuration, its models and a cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tempo_megatron.config.check import check_shapes
from tempo_megatron.config.layout import ModelShape, read_model_shape
from tempo_megatron.config.load import load_config
from tempo_megatron.config.schema import Config
from tempo_megatron.errors import TempoError
from tempo_megatron.locate import resolve_init
from tempo_megatron.planner.hardware import Card, Cluster, find_card
from tempo_megatron.planner.memory import host_memory
from tempo_megatron.planner.range import GIB
from tempo_megatron.planner.sizes import ModelSizes

#: Rates of a card that ``--rate`` may set, with their units.
RATES = {
    "bf16": "FLOP/s",
    "fp32": "FLOP/s",
    "bandwidth": "bytes/s",
    "link": "bytes/s",
    "network": "bytes/s",
    "host": "bytes/s",
}


@dataclass(frozen=True)
class PlanRequest:
    """``sizes`` and ``shapes``: of each role's model."""

    config: Config
    sizes: dict[str, ModelSizes]
    shapes: dict[str, ModelShape]
    cluster: Cluster


def model_folders(config: Config, model: Path | None) -> dict[str, Path]:
    """By role, the folder with its ``config.json``: of ``init``, or ``model`` where that is not there (yet).

    Raises:
        TempoError: neither is there.
    """
    found = {}
    for role, settings in (("actor", config.actor), ("critic", config.critic)):
        if settings is None:
            continue
        if model is not None and not Path(settings.init).expanduser().is_dir():
            found[role] = model
        elif (Path(settings.init) / "config.json").is_file():  # weights are not asked for
            found[role] = Path(settings.init)
        else:
            try:
                found[role] = resolve_init(settings.init, f"{role}.init").hf_dir
            except TempoError as error:
                raise TempoError(f"{error}; or give --model FOLDER, with the model's config.json") from None
    return found


def read_request(
    config_file: str,
    overrides: list[str],
    *,
    nodes: int | None = None,
    ranks_per_node: int | None = None,
    card: str | None = None,
    device_memory_gib: float | None = None,
    host_memory_gib: float | None = None,
    model: Path | None = None,
    rates: list[str] | None = None,
) -> PlanRequest:
    """Nodes, ranks, card and host memory are those of section ``slurm`` where they are None.

    Raises:
        TempoError: for what is wrong with the configuration, its models' sizes or the cluster.
    """
    config = load_config(config_file, overrides)
    nodes = config.slurm.nodes if nodes is None else nodes
    if ranks_per_node is None:
        ranks_per_node = config.slurm.gpus_per_node or config.launch.nproc_per_node
    card = card or config.slurm.gpu or "h100-80gb"
    if host_memory_gib is None and card != "cpu":
        host_memory_gib = config.slurm.host_memory_gib
    for option, number in (("--nodes", nodes), ("--gpus-per-node", ranks_per_node)):
        if number < 1:
            raise TempoError(f"command line: {option} {number} must be at least 1")
    cluster = make_cluster(nodes, ranks_per_node, card, device_memory_gib, host_memory_gib, rates or [])
    sizes, shapes = {}, {}
    for role, folder in model_folders(config, model).items():
        key = f"{role}.init"
        shapes[role] = read_model_shape(folder / "config.json", key, critic=role == "critic")
        sizes[role] = ModelSizes.read(folder, key, critic=role == "critic")
    check_shapes(config, shapes, cluster.world_size)
    return PlanRequest(config, sizes, shapes, cluster)


def make_cluster(
    nodes: int,
    ranks_per_node: int,
    card: str,
    device_memory_gib: float | None,
    host_memory_gib: float | None,
    rates: list[str],
) -> Cluster:
    """Raises TempoError for an unknown card or rate, and for sizes that are none."""
    for option, size in (("--device-memory-gib", device_memory_gib), ("--host-memory-gib", host_memory_gib)):
        if size is not None and not 0 < size < 1e6:
            raise TempoError(f"command line: {option} {size:g} must be GiB above 0")
    chosen = _with_rates(find_card(card), rates)
    host = None if host_memory_gib is None else int(host_memory_gib * GIB)
    if device_memory_gib is not None:
        chosen = replace(chosen, memory=int(device_memory_gib * GIB))
    elif card == "cpu":
        chosen = replace(chosen, memory=(host or host_memory()) // ranks_per_node)
    return Cluster(nodes, ranks_per_node, chosen, None if card == "cpu" else host)


def _with_rates(card: Card, rates: list[str]) -> Card:
    changes = {}
    for word in rates:
        name, _, value = word.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if name not in RATES or not 0 < number < float("inf"):
            valid = ", ".join(f"{rate} ({unit})" for rate, unit in RATES.items())
            raise TempoError(f"command line: --rate {word} must be NAME=NUMBER, NAME one of {valid}")
        changes[name] = number
    return replace(card, **changes)  # type: ignore[arg-type]
