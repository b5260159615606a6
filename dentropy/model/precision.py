"""Full float32 for the time of a pass.

ΔH at a small step is the difference of two numbers that agree in most of their digits; TF32 and bf16 products would
drown it, and convolutions (mamba's) use TF32 unless told otherwise. PyTorch keeps each setting in two places, an older
one for all backends and a newer one per backend and kind of operation.
"""

from contextlib import contextmanager

import torch
from torch.backends import cuda, cudnn, mkldnn


@contextmanager
def full_float32():
    """float32 products and convolutions in float32 on every backend; what the user had set comes back afterwards.

    Raises RuntimeError where PyTorch does not report the setting back: a measurement in TF32 must not pass for one in
    float32.
    """
    kinds = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    newer = [kind.fp32_precision for kind in kinds]
    products = _older(torch.get_float32_matmul_precision, "highest")
    convolutions = _older(lambda: cudnn.allow_tf32, True)
    try:
        _set("highest", False, ["ieee"] * len(kinds), kinds)
        found = [torch.get_float32_matmul_precision(), cudnn.allow_tf32, *(kind.fp32_precision for kind in kinds)]
        if found != ["highest", False, *["ieee"] * len(kinds)]:
            raise RuntimeError(f"float32 precision: asked for 'highest', False and 'ieee', PyTorch reports {found}")
        yield
    finally:
        _set(products, convolutions, newer, kinds)


def _set(products: str, convolutions: bool, newer: list[str], kinds) -> None:
    torch.set_float32_matmul_precision(products)  # the older interface first: it writes both places
    cudnn.allow_tf32 = convolutions
    for kind, precision in zip(kinds, newer, strict=True):
        kind.fp32_precision = precision


def _older(read, default):
    """A setting of the older interface, or its default: it cannot be read once the newer one alone was used."""
    try:
        return read()
    except RuntimeError:
        return default
