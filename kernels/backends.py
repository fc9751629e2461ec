"""Which implementation of an operator runs."""

from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["reference", "packed", "fused"]


def pick_backend(x: Tensor, backend: Backend | None = None, *, fits: bool = True) -> Backend:
    """The backend asked for, else "fused" where `x` is a 16-bit CUDA tensor whose shape `fits`, else "packed".

    Raises ValueError for a name that is no backend.
    """
    if backend is not None:
        if backend not in get_args(Backend):
            raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(get_args(Backend))}")
        return backend
    half = x.dtype in (torch.float16, torch.bfloat16)
    return "fused" if x.is_cuda and half and fits and find_spec("triton") is not None else "packed"
