"""vLLM's platform of a machine with one H100, where there is none: what vLLM decides by it can be looked at."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

GIB = 1 << 30


def without_driver() -> None:
    """Let libraries load that are linked with the driver's, where there is none; before they are imported.

    LIBCUDA names an empty library in its place (``conftest.py`` makes it); symbols are looked up when they are called.
    """
    if library := os.environ.get("LIBCUDA"):
        ctypes.CDLL(library, mode=os.RTLD_GLOBAL)
        sys.setdlopenflags(os.RTLD_LAZY)


def pretend() -> None:
    """From now on vLLM takes this machine for one; before anything of it is imported that asks."""
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class OneHopper(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100 80GB HBM3"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 * GIB

        @classmethod
        def device_count(cls) -> int:
            return 1

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

    vllm.platforms._current_platform = OneHopper()


def shown_to_transformer_engine() -> None:
    """From now on Transformer Engine believes that there is a GPU, without which its layers refuse to be made."""
    is_available = torch.cuda.is_available

    def seen() -> bool:
        return sys._getframe(1).f_globals["__name__"].startswith("transformer_engine.") or is_available()

    torch.cuda.is_available = seen
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
