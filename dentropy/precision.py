"""Full float32 for the time of a pass.

ΔH at a small step is the difference of two numbers that agree in most of their digits; TF32 and bf16 products would
drown it. PyTorch keeps the setting in two places, an older one for all backends and a newer one per backend.
"""

from contextlib import contextmanager

import torch


@contextmanager
def full_float32():
    """float32 matrix products in float32 on every backend; what the user had set comes back afterwards."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    newer = [backend.fp32_precision for backend in backends]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the newer interface alone: the older cannot be read, and was at its default
        older = "highest"
    torch.set_float32_matmul_precision("highest")  # sets both places
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, newer, strict=True):
            backend.fp32_precision = precision
