"""Which implementation of an operator runs."""

import os
from functools import cache
from importlib import import_module
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["reference", "packed", "fused"]


def pick_backend(x: Tensor, *others: Tensor, backend: Backend | None = None, fits: bool = True) -> Backend:
    """The backend asked for, else "fused" where `x` is a 16-bit CUDA tensor whose shape `fits`, else "packed".

    others: what else a gradient might be wanted of, which kernels do not compute: "packed" then.
    GPUs before Ampere (compute capability 8.0) have too little shared memory for the kernels' blocks.
    Raises ValueError for an unknown backend, and for "fused" where it cannot run.
    """
    gradients = torch.is_grad_enabled() and any(each.requires_grad for each in (x, *others))
    if backend == "fused":
        if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"the fused backend runs on a GPU, and the tensors are on {x.device}: leave backend out")
        if not x.is_cuda and x.dtype == torch.bfloat16:
            raise ValueError("Triton's interpreter is wrong in bfloat16: give float16 or float32")
        if gradients:
            raise ValueError("the fused backend computes no gradients: leave backend out, or use torch.no_grad()")
    if backend is not None:
        if backend not in get_args(Backend):
            raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(get_args(Backend))}")
        return backend
    half = x.dtype in (torch.float16, torch.bfloat16)
    able = x.is_cuda and has_triton() and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return "fused" if able and half and fits and not gradients else "packed"


@cache
def has_triton() -> bool:
    """Whether there is a Triton that can compile the kernels: 3.4 or later, for NVIDIA's GPUs."""
    try:
        import_module("triton.language.extra.cuda.gdc")
    except ImportError:
        return False
    return True


def check_shapes(**tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raises ValueError that names a tensor which does not have the shape that it is given with."""
    for name, (x, shape) in tensors.items():
        if x.shape != shape:
            raise ValueError(f"{name} is {list(x.shape)}: to match the other tensors, it has to be {list(shape)}")


def check_dtypes(x: Tensor, **tensors: Tensor) -> None:
    """Raises ValueError if `x` is not floating point, or that names a tensor of another type than `x`."""
    if not x.is_floating_point():
        raise ValueError(f"the tensors are of {x.dtype}: give floating point")
    for name, other in tensors.items():
        if other.dtype != x.dtype:
            raise ValueError(f"{name} is of {other.dtype}: to match the other tensors, make it {x.dtype}")


def check_masks(**tensors: Tensor) -> None:
    """Raises ValueError that names a mask which is not boolean: integers would be inverted bit by bit."""
    for name, x in tensors.items():
        if x.dtype != torch.bool:
            raise ValueError(f"{name} is of {x.dtype}: make it torch.bool")


def with_contiguous_rows(x: Tensor) -> Tensor:
    """x, copied where the values along its last axis do not follow one another in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()
