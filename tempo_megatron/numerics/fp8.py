"""FP8 as Transformer Engine quantises to it: codes, scales from largest magnitudes, blocks, histories.

Source: Transformer Engine 2.11, common/recipe (recipe_common.cuh, current_scaling.cu, delayed_scaling.cu),
common/transpose/quantize_transpose_*_blockwise.cu, common/cast/mxfp8 and ptx.cuh; its own references in
tests/pytorch/references. All arithmetic is float32. A matrix ``[rows, cols]`` is quantised for a product that sums over
its columns; for one that sums over its rows its transpose is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
#: Powers of two: a byte b is 2^(b - 127), and 255 no number.
E8M0 = torch.float8_e8m0fnu

#: Side of the blocks that share a scale (Float8BlockScaling: 1 x 128 and 128 x 128), and length of MXFP8's.
BLOCK = 128
MX_BLOCK = 32

_FLOAT32_MAX = torch.finfo(torch.float32).max
_MANTISSA_BITS = 23
_MANTISSA = (1 << _MANTISSA_BITS) - 1


@dataclass(frozen=True)
class Quantised:
    """A matrix in FP8.

    Attributes:
        codes: ``[rows, cols]`` float8_e4m3fn or float8_e5m2.
        scale_inv: what the codes of a block are multiplied by, ``[ceil(rows / block[0]), ceil(cols / block[1])]``,
            float32 or (MXFP8) float8_e8m0fnu.
        block: rows and columns that share a scale; blocks begin at element 0, the last may have less.
    """

    codes: Tensor
    scale_inv: Tensor
    block: tuple[int, int]

    def dequantise(self) -> Tensor:
        """``[rows, cols]`` float32: code times scale."""
        scale_inv = self.scale_inv.float()
        if scale_inv.numel() == 1:
            return self.codes.float() * scale_inv
        return _joined(_tiles(self.codes.float(), self.block) * scale_inv[:, None, :, None], self.codes.shape)

    def t(self) -> Quantised:
        """The transpose; the same codes."""
        return Quantised(self.codes.t(), self.scale_inv.t(), self.block[::-1])


def cast(values: Tensor, code: torch.dtype) -> Tensor:
    """Codes of float32 ``values``: the nearest, of two equally near the even one.

    What is larger than the largest number of the format becomes that number, infinities too (CUDA's __NV_SATFINITE;
    torch's own cast makes NaN or infinities of them). NaN stays NaN.
    """
    most = torch.finfo(code).max
    return values.clamp(-most, most).to(code)


def scale_of(amax: Tensor, code: torch.dtype, *, power_of_two: bool = False) -> Tensor:
    """What values with these largest magnitudes are multiplied by before they are cast; float32, of ``amax``'s shape.

    The format's largest number / amax, or the power of two at or below it; 1 where amax is 0 or not finite; where the
    quotient is beyond float32, float32's largest number (2^127 as a power of two). Source: recipe_common.cuh,
    compute_scale_from_amax.
    """
    # divided by a tensor: on CUDA torch would multiply by the reciprocal of a number, which rounds otherwise
    scale = torch.full_like(amax, torch.finfo(code).max).div_(amax).clamp_(max=_FLOAT32_MAX)
    if power_of_two:
        scale = (scale.view(torch.int32) & ~_MANTISSA).view(torch.float32)
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def quantise_tensor(values: Tensor, code: torch.dtype, scale: Tensor | None = None) -> Quantised:
    """A matrix with one scale.

    Args:
        scale: one float32 number, of earlier tensors (delayed scaling); None: of this tensor (current scaling).
    """
    if scale is None:
        scale = scale_of(largest(values), code)
    codes = cast(values.float() * scale, code)
    return Quantised(codes, scale.reciprocal().view(1, 1), (max(1, codes.shape[0]), max(1, codes.shape[1])))


def quantise_blocks(values: Tensor, code: torch.dtype, block: tuple[int, int]) -> Quantised:
    """A matrix with a power of two as scale for each block (Float8BlockScaling, whose default those are)."""
    tiles = _tiles(values.float(), block)
    scale = scale_of(_magnitudes(tiles).amax((1, 3)), code, power_of_two=True)
    codes = cast(tiles.mul_(scale[:, None, :, None]), code)
    return Quantised(_joined(codes, values.shape), scale.reciprocal(), block)


def quantise_mx(values: Tensor, code: torch.dtype) -> Quantised:
    """A matrix in MXFP8: each 32 neighbours of a row share a power of two in a byte (OCP Microscaling formats)."""
    block = (1, MX_BLOCK)
    tiles = _tiles(values.float(), block)
    # the kernels multiply by the reciprocal
    limit = torch.full((), 1 / torch.finfo(code).max, device=values.device)
    bits = e8m0_bits(_magnitudes(tiles).amax((1, 3)) * limit)
    scale = torch.where(bits == 0, 1.0, ((254 - bits) << _MANTISSA_BITS).view(torch.float32))
    codes = cast(tiles.mul_(scale[:, None, :, None]), code)
    return Quantised(_joined(codes, values.shape), bits.to(torch.uint8).view(E8M0), block)


def e8m0_bits(values: Tensor) -> Tensor:
    """int32 bytes of the least powers of two that are not below ``values``, float32 and not negative.

    At most 254, 2^127, infinity too; 255 for NaN; 0, which is 2^-127, for 0. Source: ptx.cuh, float_to_e8m0.
    """
    bits = values.view(torch.int32)
    exponent, mantissa = bits >> _MANTISSA_BITS, bits & _MANTISSA
    up = (mantissa > 0) & (exponent != 254) & ((exponent > 0) | (mantissa > 1 << (_MANTISSA_BITS - 1)))
    found = torch.where(values.isinf(), 254, exponent + up.int())
    return torch.where(values.isnan(), 255, found).to(torch.int32)


def largest(values: Tensor) -> Tensor:
    """The largest magnitude, float32, without dimensions; 0 of no values. NaN is passed over, as fmaxf does."""
    if not values.numel():
        return torch.zeros((), device=values.device)
    return _magnitudes(values.float()).amax()


def next_scales(
    history: Tensor, scales: Tensor, codes: list[torch.dtype], *, margin: int, most_recent: bool
) -> tuple[Tensor, Tensor]:
    """Histories and scales of delayed scaling, after a step whose largest magnitudes are in ``history[0]``.

    The rows of the history move on by one, the oldest is dropped, and ``history[0]`` is 0 for the next step. A scale is
    the format's largest number / 2^margin / amax of the history, or of its newest row; where that is 0 or not finite
    the scale stays. Source: delayed_scaling.cu, amax_and_scale_update.

    Args:
        history: ``[length, n]`` float32, of n tensors.
        scales: ``[n]`` float32.
        codes: the formats, n of them.
    """
    newest = history[0]
    rolled = history.roll(-1, 0)
    amax = newest if most_recent else rolled.amax(0)
    most = torch.tensor([torch.finfo(code).max * 2.0**-margin for code in codes], device=history.device)
    found = (most / amax).clamp_(max=_FLOAT32_MAX)
    rolled[0] = 0
    return rolled, torch.where((amax > 0) & amax.isfinite(), found, scales)


def _magnitudes(values: Tensor) -> Tensor:
    """Of values that are not NaN; 0 of those that are."""
    return values.abs().nan_to_num_(nan=0.0, posinf=torch.inf)


def _tiles(values: Tensor, block: tuple[int, int]) -> Tensor:
    """A copy ``[rows / block, block rows, cols / block, block columns]``, zeros beyond the matrix."""
    rows, cols = values.shape
    down, across = -(-rows // block[0]), -(-cols // block[1])
    filled = values.new_zeros(down * block[0], across * block[1])
    filled[:rows, :cols] = values
    return filled.view(down, block[0], across, block[1])


def _joined(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The matrix that ``_tiles`` has cut."""
    down, height, across, width = tiles.shape
    return tiles.reshape(down * height, across * width)[: shape[0], : shape[1]].contiguous()
