"""Published numbers of cards and links, and what of them is assumed to be reached. One table; all can be overridden."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tempo_megatron.errors import TempoError

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """One accelerator (or one CPU rank) and its links.

    Attributes:
        memory: bytes that a process can allocate on an empty card, context included.
        bf16, fp32: dense matrix products, FLOP/s.
        bandwidth: of its memory, bytes/s.
        link: to the other cards of its node, bytes/s one way.
        network: to other nodes, bytes/s one way, for each card.
        host: of its copies to host memory, bytes/s.
        source: of these numbers.
    """

    name: str
    memory: int
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    network: float
    host: float
    source: str


#: Dense rates, without sparsity. ``memory`` is what the driver reports for the card, below its name's GB.
CARDS = {
    card.name: card
    for card in (
        Card(
            "a100-80gb", int(79.15 * GIB), 312e12, 156e12, 2.039e12, 300e9, 25e9, 25e9,
            "NVIDIA A100 datasheet (SXM 80 GB); fp32 as TF32; InfiniBand HDR 200 Gbit/s a card",
        ),
        Card(
            "h100-80gb", int(79.10 * GIB), 989e12, 494e12, 3.35e12, 450e9, 50e9, 50e9,
            "NVIDIA H100 datasheet (SXM); fp32 as TF32; InfiniBand NDR 400 Gbit/s a card",
        ),
        Card(
            "h200", int(139.8 * GIB), 989e12, 494e12, 4.8e12, 450e9, 50e9, 50e9,
            "NVIDIA H200 datasheet (SXM); fp32 as TF32; InfiniBand NDR 400 Gbit/s a card",
        ),
        Card(
            "b200", int(178.3 * GIB), 2250e12, 1125e12, 7.7e12, 900e9, 50e9, 50e9,
            "NVIDIA DGX B200 datasheet, an eighth of the system; fp32 as TF32; InfiniBand NDR 400 Gbit/s a card",
        ),
        Card(
            "cpu", 0, 5e10, 5e10, 1e10, 5e9, 1e9, 1e9,
            "one core of a server, an order of magnitude; memory is the host's, divided by its ranks",
        ),
    )
}  # fmt: skip

#: Shares of the published rates that phases are assumed to reach; multiplied into every time.
EFFICIENCY = {
    "train": 0.40,  # of matrix products, forward and backward; Megatron-LM reports 0.40 to 0.47 for dense bf16 on H100
    "prefill": 0.50,  # of matrix products, vLLM's prompts
    "decode": 0.60,  # of memory bandwidth, one token of each running sequence
    "link": 0.70,  # of link and network rates
    "host": 0.70,  # of copies to host memory
}


def find_card(name: str) -> Card:
    """TempoError with the names there are."""
    if name not in CARDS:
        raise TempoError(f"command line: --gpu {name} is unknown; one of {', '.join(CARDS)}")
    return CARDS[name]


@dataclass(frozen=True)
class Cluster:
    """What a job runs on.

    Attributes:
        nodes, ranks_per_node: one rank for each card.
        card: of each rank; its ``memory`` is what one rank may take.
        host_memory: bytes of a node beside its cards; None: not known, nothing is said of it.
        on_cpu: the device is the host.
    """

    nodes: int
    ranks_per_node: int
    card: Card
    host_memory: int | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def on_cpu(self) -> bool:
        return self.card.name == "cpu"

    def with_memory(self, memory: int) -> Cluster:
        return replace(self, card=replace(self.card, memory=memory))
