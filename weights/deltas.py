"""What LoRA files [1] and their relatives do to a weight W, from the few numbers that they hold of it.

    low_rank        LoRA                        up @ down
    hadamard        LoHa [2, 3]                 (w1_a @ w1_b) * (w2_a @ w2_b)
    kronecker       LoKr [3]                    w1 (x) w2
    difference      whole weights               the change itself
    renormalised    DoRA [4], of any of them    magnitude * (W + change) / |W + change|

Convolutions are matrices too: down [rank, in, kh, kw] and up [out, rank, 1, 1] make a kernel [out, in, kh, kw]; or a
core [rank, rank, kh, kw] has the kernel's size, and the matrices on its two sides have none (Tucker's decomposition).

[1] Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.
[2] Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", 2021.
[3] Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", 2023.
[4] Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def low_rank(down: Tensor, up: Tensor, mid: Tensor | None = None) -> Tensor:
    """down [rank, in, ...], up [out, rank, 1, ...] -> [out, in * ...]; with mid, the core, down is [rank, in, 1, 1]."""
    down, up = down.flatten(1), up.flatten(1)
    return up @ down if mid is None else tucker(mid, up.T, down)


def hadamard(
    hada_w1_a: Tensor, hada_w1_b: Tensor, hada_w2_a: Tensor, hada_w2_b: Tensor,
    hada_t1: Tensor | None = None, hada_t2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Each a [out, rank], b [rank, in * ...]; with a core t, a is [rank, out] -> [out, in * ...]."""
    return product(hada_w1_a, hada_w1_b, hada_t1) * product(hada_w2_a, hada_w2_b, hada_t2)


def kronecker(
    lokr_w1: Tensor | None = None, lokr_w1_a: Tensor | None = None, lokr_w1_b: Tensor | None = None,
    lokr_w2: Tensor | None = None, lokr_w2_a: Tensor | None = None, lokr_w2_b: Tensor | None = None,
    lokr_t2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """w1 [out1, in1] and w2 [out2, in2, ...] -> [out1 * out2, in1 * in2 * ...].

    Each is whole, or given by a [out, rank] and b [rank, in * ...]; with a core t, a is [rank, out].
    """
    w1 = product(lokr_w1_a, lokr_w1_b) if lokr_w1 is None else lokr_w1
    w2 = product(lokr_w2_a, lokr_w2_b, lokr_t2) if lokr_w2 is None else lokr_w2.flatten(1)
    return torch.kron(w1, w2)


def difference(diff: Tensor) -> Tensor:
    """[out, ...] -> [out, in * ...]; a vector's values are rows of one."""
    return diff[:, None].flatten(1)


def product(a: Tensor | None, b: Tensor | None, core: Tensor | None = None) -> Tensor:
    """a [out, rank], b [rank, in * ...]; with a core, a is [rank, out] -> [out, in * ...]."""
    assert a is not None and b is not None
    return a @ b if core is None else tucker(core, a, b)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core [rank, rank, kh, kw], a [rank, out], b [rank, in] -> [out, in * kh * kw]."""
    return torch.einsum("i j h w, i o, j n -> o n h w", core, a, b).flatten(1)


def renormalised(weight: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """The weight [out, in, ...], its slices along an axis scaled to the norms in `magnitude`, one for each."""
    others = [other for other in range(weight.dim()) if other != axis]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    norm = norm.clamp(min=torch.finfo(norm.dtype).tiny)  # a slice of zeros has no direction, and stays
    return weight / norm * magnitude.reshape([1 if other in others else -1 for other in range(weight.dim())])


@dataclass(frozen=True)
class Kind:
    """A way to write down a change.

    make: factors, by name -> the change, a matrix.  whole: the sets of factors that it can be made of.
    ranked: factors whose first axis is the rank; the first that there is counts. Without one, there is no rank.
    """

    make: Callable[..., Tensor]
    whole: tuple[frozenset[str], ...]
    ranked: tuple[str, ...] = ()


def _sets(*factors: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in factors)


HADAMARD = "hada_w1_a hada_w1_b hada_w2_a hada_w2_b"
LEFT = ("lokr_w1", "lokr_w1_a lokr_w1_b")
RIGHT = ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_w2_a lokr_w2_b lokr_t2")

DIFFERENCE = Kind(difference, _sets("diff"))
KINDS = (
    Kind(low_rank, _sets("down up", "down up mid"), ("down",)),
    Kind(hadamard, _sets(HADAMARD, f"{HADAMARD} hada_t1 hada_t2"), ("hada_w1_b",)),
    Kind(kronecker, _sets(*(f"{w1} {w2}" for w1 in LEFT for w2 in RIGHT)), ("lokr_w1_b", "lokr_w2_b")),
    DIFFERENCE,
)
FACTORS = sorted(frozenset().union(*(factors for kind in KINDS for factors in kind.whole)))
