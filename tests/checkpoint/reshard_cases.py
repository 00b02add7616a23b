"""Which layouts test_reshard.py goes through, on how many ranks."""

from __future__ import annotations

from dataclasses import dataclass

from tempo_megatron.model.hf_tensors import Role


@dataclass(frozen=True)
class Chain:
    """A role that is trained under the first layout, then saved under each and loaded under the next.

    Attributes:
        layouts: of each launch.
    """

    family: str
    role: Role
    dtype: str
    distributed: bool
    layouts: tuple[tuple[str, ...], ...]

    @property
    def model(self) -> str:
        return f"{self.family}-{self.role}"

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype} {'distributed' if self.distributed else 'plain'}"


#: Ranks of the launches.
WORLDS = (2, 1, 4, 2)
CHAINS = [
    Chain("llama-tied", "critic", "float32", True, (("tp2 sp", "pp2 vpp2"), ("",), ("tp2 cp2 sp",), ("", "tp2 sp"))),
    Chain("llama-tied", "critic", "bfloat16", True, (("",), ("",), ("tp4 sp",), ("pp2 vpp2",))),
    Chain("llama-tied", "critic", "bfloat16", False, (("tp2",), ("",), ("tp2 pp2",), ("pp2 vpp2",))),
    Chain(
        "qwen3-moe",
        "actor",
        "float32",
        True,
        (("ep2", "tp2 sp etp2"), ("",), ("cp2 ep2",), ("pp2 vpp2", "tp2 sp ep2")),
    ),
    Chain("qwen3-moe", "actor", "float32", False, (("ep2",), ("",), ("pp2 ep2",), ("ep2",))),
    # one KV head of up to four ranks; stages of 3 and 2 layers (in two chunks each), of 1 and 4
    Chain(
        "qwen2",
        "actor",
        "float32",
        True,
        (
            ("tp2 sp kv1 layers5", "pp2 vpp2 kv1 layers5"),
            ("kv1 layers5",),
            ("tp2 pp2 sp kv1 layers5",),
            ("pp2 first1 kv1 layers5", "tp2 kv1 layers5"),
        ),
    ),
]
