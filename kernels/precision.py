"""What sums and comparisons are computed in."""

from torch import Tensor, float32, promote_types


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it is in."""
    return x.to(promote_types(x.dtype, float32))
