"""What several ops share: the dtype they compute in, and argument checks with uniform messages."""

from collections.abc import Sequence

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for a float64 input (the reference alone takes one), float32 for every other."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_tensor(op: str, name: str, value: Tensor) -> None:
    """Raise TypeError naming the op, the argument and its type unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected a tensor")


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError naming the op, the argument, its shape and the shape it needs; as `check_tensor`."""
    check_tensor(op, name, tensor)
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")


def check_axes(op: str, name: str, tensor: Tensor, *axes: str) -> None:
    """Raise ValueError unless a tensor has these axes; if the first is "...", any number of others may come before.

    Also as `check_tensor`.
    """
    check_tensor(op, name, tensor)
    right = tensor.ndim >= len(axes) - 1 if axes[0] == "..." else tensor.ndim == len(axes)
    if not right:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected ({', '.join(axes)})")


def check_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors, except those that are None, are on the device of the first.

    For some mixtures PyTorch itself returns meaningless numbers. Also as `check_tensor`.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        check_tensor(op, name, tensor)
    (first, like), *others = given.items()
    device = like.device
    for name, tensor in others:
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {device}; expected one device")


def check_eps(op: str, eps: float) -> None:
    """Raise ValueError unless a norm's eps is positive: a constant row would divide by zero."""
    if not eps > 0:
        raise ValueError(f"{op}: eps is {eps}, expected a positive number")


def check_unimix(op: str, unimix: float) -> None:
    """Raise ValueError unless unimix is a share that leaves something of the distribution."""
    if not 0 <= unimix < 1:
        raise ValueError(f"{op}: unimix is {unimix}, expected a share in [0, 1)")


def check_out(
    op: str,
    name: str,
    out: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *inputs: Tensor,
    contiguous: bool = False,
) -> None:
    """Raise unless `out` is None or can hold a result of this shape and dtype, in whole rows that lie evenly apart.

    ValueError or TypeError for the tensor; RuntimeError if a gradient of `inputs` is wanted, which `out` cannot carry.
    contiguous: whether the rows must lie side by side.
    """
    if out is None:
        return
    check_shape(op, name, out, shape)
    if out.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {out.dtype}, expected {dtype}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise RuntimeError(f"{op}: {name} takes no gradient, and one is wanted; use torch.no_grad()")
    if contiguous:
        if not out.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {out.stride()}, expected a contiguous tensor")
        return
    try:
        rows = rows_of(out)
        apart = (rows.stride(1) == 1 or shape[-1] == 1) and (len(rows) <= 1 or rows.stride(0) >= shape[-1])
    except RuntimeError:
        apart = False
    if not apart:
        raise ValueError(
            f"{op}: {name} has strides {out.stride()}, expected whole rows that lie evenly apart"
        )


def rows_of(out: Tensor) -> Tensor:
    """(..., columns) -> (N, columns), a view; RuntimeError if there is none."""
    return out.view(out.shape[:-1].numel(), out.shape[-1])


def as_contiguous(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same tensors as kernels read them: copies of those that are not contiguous, or are lazily negated."""
    if all(tensor.is_contiguous() and not tensor.is_neg() for tensor in tensors):
        return tensors
    return [tensor.resolve_neg().contiguous() for tensor in tensors]


def copy_back(tensors: Sequence[Tensor], laid: Sequence[Tensor]) -> None:
    """Writes the copies that `as_contiguous` made back into the original tensors."""
    if laid is tensors:
        return
    for tensor, copy in zip(tensors, laid, strict=True):
        if copy is not tensor:
            tensor.copy_(copy)
