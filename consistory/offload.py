"""Weights that visit the device only while their module runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the module's weights are on `device`; after it they are where they were, whatever happened.

    What comes back are the very tensors that went: the copies on the device are dropped, nothing is copied back, and
    weights that are mapped from a file stay so. A module that is there already is left alone.
    """
    home = module.state_dict(keep_vars=True)
    if all(weight.device == device for weight in home.values()):
        yield
        return
    copies = {name: weight.to(device) for name, weight in home.items()}
    try:
        module.load_state_dict(copies, assign=True)
        del copies  # or it would keep the device's memory
        yield
    finally:
        module.load_state_dict(home, assign=True)
