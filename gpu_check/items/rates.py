"""What this device reaches in the two things that all else is measured by: matrix products and copies."""

from __future__ import annotations

import torch

from benchmarks.harness import Spread
from gpu_check.check import Check
from gpu_check.items.device import join, seconds_of
from tempo_megatron.parallel.device import device, use_cuda
from tempo_megatron.planner.hardware import CARDS, Card


def run(check: Check) -> None:
    join()
    products = {dtype: matmul_rate(dtype) for dtype in (torch.bfloat16, torch.float32)}
    for dtype, rate in products.items():
        check.figure(f"matrix products, {str(dtype).removeprefix('torch.')}", _scaled(rate, 1e-12), "TFLOP/s")
    copied = copy_rate()
    check.figure("copy within the device's memory, read and written", _scaled(copied, 2e-9), "GB/s")
    if not use_cuda():
        check.note("copies between host and device: the device is the host")
        return
    pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(pinned, device=device())
    to_device = seconds_of(lambda: there.copy_(pinned, non_blocking=True)).inverse(pinned.nbytes)
    to_host = seconds_of(lambda: pinned.copy_(there, non_blocking=True)).inverse(pinned.nbytes)
    check.figure("pinned host memory to device", _scaled(to_device, 1e-9), "GB/s")
    check.figure("device to pinned host memory", _scaled(to_host, 1e-9), "GB/s")
    if (card := published(torch.cuda.get_device_name())) is None:
        check.note(f"{torch.cuda.get_device_name()}: not in the planner's table, nothing to compare with")
        return
    for what, rate, of in (
        ("matrix products, bfloat16", products[torch.bfloat16], card.bf16),
        ("copy within the device's memory", _scaled(copied, 2), card.bandwidth),
        ("device to pinned host memory", to_host, card.host),
    ):
        check.figure(f"{what}: of the planner's {card.name}", _scaled(rate, 100 / of), "%")


def matmul_rate(dtype: torch.dtype) -> Spread:
    """FLOP/s of large square products."""
    n = 8192 if use_cuda() else 512
    a, b = (torch.randn(n, n, device=device()).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    repeat = 10 if use_cuda() else 1

    def work() -> None:
        for _ in range(repeat):
            torch.mm(a, b, out=out)

    return seconds_of(work).inverse(2 * n**3 * repeat)


def copy_rate() -> Spread:
    """Bytes/s copied from one place of the device's memory to another."""
    a = torch.ones(2**30 if use_cuda() else 2**26, dtype=torch.uint8, device=device())
    b = torch.empty_like(a)
    return seconds_of(lambda: b.copy_(a)).inverse(a.nbytes)


def published(name: str) -> Card | None:
    """The planner's card for what the driver calls ``name``."""
    return next((card for card in CARDS.values() if card.name.split("-")[0].upper() in name.upper()), None)


def _scaled(spread: Spread, factor: float) -> Spread:
    return Spread(spread.median * factor, spread.low * factor, spread.high * factor)
