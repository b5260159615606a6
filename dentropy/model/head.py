"""A model's head, and what of it is a constant of the logits."""

from typing import NamedTuple

from torch import Tensor


class Head(NamedTuple):
    """logits = softcap(scale · (hidden Wᵀ + bias)); softcap(z) = c·tanh(z/c)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None
    group: object = None  # the process group over whose ranks the rows of weight and bias are spread; None: whole

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, config, group=None) -> "Head":
        """With the constants that models keep in their config, each under a name of its own."""
        scale = getattr(config, "logit_scale", None) or 1.0  # cohere
        scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # falcon_h1
        scale /= getattr(config, "logits_scaling", None) or 1.0  # granite
        return cls(weight, bias, scale, getattr(config, "final_logit_softcapping", None), group)  # gemma

    def transform(self, temperature: float) -> dict[str, float | None]:
        """`temperature` and `softcap` for a function of raw logits z = hidden Wᵀ + bias, the scale s folded into both:
        c·tanh(s·z/c)/T = c'·tanh(z/c')/T' with c' = c/s and T' = T/s."""
        softcap = None if self.softcap is None else self.softcap / self.scale
        return dict(temperature=temperature / self.scale, softcap=softcap)
