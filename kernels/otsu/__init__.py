"""Otsu's threshold of many maps at once, on the device they live on."""

import torch
from torch import Tensor

__all__ = ["otsu_threshold"]

BINS = 256


def otsu_threshold(x: Tensor) -> Tensor:
    """The threshold that maximises the variance between the values above it and those below it (Otsu 1979).

    x           [..., n] finite float32 or float64; every row is a map of its own
    returns     [...], dtype of x: the centre of one of 256 equal bins between the row's minimum and maximum, the
                lowest of equally good ones; a constant row gives its value, so that nothing lies above

    Values greater than the threshold are the upper class. This is scikit-image's `threshold_otsu` with the classes
    compared in exact arithmetic, so that the choice between equally good bins is the same on every device.

    Raises ValueError for another dtype.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the maps are {x.dtype}: convert them to float32 or float64")
    if x.device.type == "mps":  # which has no float64
        return otsu_threshold(x.cpu()).to(x.device)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    edges = _bin_edges(low, high)
    bins = (torch.searchsorted(edges, x.contiguous(), right=True) - 1).clamp(0, BINS - 1)
    centre = (edges[..., :-1] + edges[..., 1:]) / 2
    best = _variance_between(_histogram(bins)).argmax(-1, keepdim=True)
    return torch.where(low == high, low, centre.gather(-1, best)).squeeze(-1)


def _bin_edges(low: Tensor, high: Tensor) -> Tensor:
    """[..., 1] each -> [..., 257]. In float64 and rounded once, as numpy 1 does for a float32 histogram."""
    start, stop = low.double(), high.double()
    ramp = torch.arange(BINS, dtype=torch.float64, device=low.device)
    return torch.cat([(start + ramp * ((stop - start) / BINS)).to(low.dtype), high], dim=-1)


def _histogram(bins: Tensor) -> Tensor:
    """int64 [..., n] bin numbers -> int64 [..., 256] counts."""
    return bins.new_zeros(*bins.shape[:-1], BINS).scatter_add_(-1, bins, torch.ones_like(bins))


def _variance_between(count: Tensor) -> Tensor:
    """int64 [..., 256] -> float64 [..., 255]: up to a factor, the variance between the values up to a bin and the rest.

    With means in units of bins, weight1 * weight2 * (mean1 - mean2)^2 is (sum1 * weight2 - sum2 * weight1)^2 /
    (weight1 * weight2), whose parts are integers: an empty bin changes nothing, so plateaus are exact.
    """
    number = torch.arange(BINS, device=count.device)
    weight, total = count.cumsum(-1), (count * number).cumsum(-1)
    weight1, sum1 = weight[..., :-1], total[..., :-1]
    weight2, sum2 = weight[..., -1:] - weight1, total[..., -1:] - sum1
    return (sum1 * weight2 - sum2 * weight1).double().square() / (weight1 * weight2).double()
