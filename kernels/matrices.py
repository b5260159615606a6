"""How a kernel is told of a matrix: by a descriptor of the tensor memory accelerator, or pointer and strides."""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


def with_strides(tensor: torch.Tensor | None) -> tuple | None:
    """(tensor, its strides in elements). What is in a tuple is specialized on its alignment, whatever a kernel says."""
    return None if tensor is None else (tensor, *tensor.stride())


def fits_a_descriptor(matrix: torch.Tensor) -> bool:
    """Descriptors want rows that lie whole, one after the other, and start at multiples of 16 bytes."""
    return (
        matrix.numel() > 0
        and matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * matrix.element_size() % 16 == 0
    )


def descriptor(matrix: torch.Tensor | None, rows: int, columns: int) -> TensorDescriptor | None:
    """For tiles [rows, columns]. Made anew for every launch: that takes no longer than to look up whether an old one
    still fits."""
    return None if matrix is None else TensorDescriptor.from_tensor(matrix, [rows, columns])
