"""FP8 of a role's linear layers, as settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tempo_megatron.config.section import Section

#: Transformer Engine's default of each recipe (common/recipe/__init__.py).
_FORMATS: dict[str, Literal["hybrid", "e4m3"]] = {
    "delayed": "hybrid",
    "current": "hybrid",
    "blockwise": "e4m3",
    "mxfp8": "e4m3",
}


class Fp8Config(Section):
    """Products of linear layers in FP8. Embeddings, norms, attention's scores, the router, the output layer, the value
    head and the losses never are; master weights stay float32.
    """

    recipe: Literal["none", "delayed", "current", "blockwise", "mxfp8"] = Field(
        "none",
        description="where scales come from. delayed: largest magnitudes of earlier micro-batches; current: of the "
        "tensor; blockwise: of 1 x 128 of activations and gradients, 128 x 128 of weights; mxfp8: of 1 x 32. none: no "
        "FP8. Without emulated it takes layer_spec te, dtype bfloat16 and a card with kernels for it",
    )
    emulated: bool = Field(
        False,
        description="the recipe's rounding with products in float32, by torch, on any device: to study what FP8 does. "
        "It is slower than no FP8",
    )
    format: Literal["auto", "hybrid", "e4m3"] = Field(
        "auto",
        description="hybrid: gradients in e5m2, all else in e4m3. auto: hybrid of delayed and current, e4m3 of "
        "blockwise and mxfp8",
    )
    first_layers_out: int | None = Field(
        None, ge=0, description="so many first layers stay in dtype; null: 1, with delayed 0, which takes all layers"
    )
    last_layers_out: int | None = Field(
        None, ge=0, description="so many last layers stay in dtype; null: 1, with delayed 0, which takes all layers"
    )
    amax_history: int = Field(
        1024, ge=1, description="delayed: micro-batches whose largest magnitudes are remembered; see amax"
    )
    amax: Literal["max", "most_recent"] = Field(
        "max", description="delayed: the scale is of the largest in the history, or of its newest"
    )
    margin: int = Field(0, ge=0, description="delayed: scales are 2^margin below what would just fit")

    @model_validator(mode="after")
    def _of_the_recipe(self) -> Fp8Config:
        if self.recipe != "delayed":
            for name in ("amax_history", "amax", "margin"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: {getattr(self, name)} is of recipe: delayed, not of {self.recipe}")
        elif self.layers_out != (0, 0):
            raise ValueError(
                f"first_layers_out: {self.layers_out[0]} and last_layers_out: {self.layers_out[1]} must be 0 with "
                "recipe: delayed, whose scales are updated for all layers together"
            )
        if self.recipe == "none" and self.emulated:
            raise ValueError("emulated: true needs a recipe")
        return self

    @property
    def is_on(self) -> bool:
        return self.recipe != "none"

    @property
    def megatron_format(self) -> Literal["hybrid", "e4m3"]:
        """``format`` with ``auto`` resolved; of a recipe."""
        return _FORMATS[self.recipe] if self.format == "auto" else self.format

    @property
    def layers_out(self) -> tuple[int, int]:
        """First and last layers that stay in the role's dtype."""
        default = 0 if self.recipe == "delayed" else 1
        first, last = self.first_layers_out, self.last_layers_out
        return default if first is None else first, default if last is None else last

    def takes(self, layer: int, layers: int) -> bool:
        """Whether (0-based) layer ``layer`` of ``layers`` computes in FP8."""
        first, last = self.layers_out
        return self.is_on and first <= layer < layers - last

    @property
    def multiple(self) -> int:
        """What the tokens and the widths of a product are multiples of (Transformer Engine: 16; MXFP8: its block)."""
        return {"none": 1, "mxfp8": 32}.get(self.recipe, 16)
