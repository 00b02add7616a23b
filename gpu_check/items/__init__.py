"""The items' modules. On the CPU the shim is installed before any of them imports Megatron."""

from __future__ import annotations

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()
