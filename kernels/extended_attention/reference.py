"""Extended attention as the paper writes it: a joint softmax with log M added to the scores (eqs. 2-3)."""

import torch
from torch import Tensor

from consistory.kernels.precision import at_least_float32


def extended_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    anchor_k: Tensor,
    anchor_v: Tensor,
    key_mask: Tensor,
    share: Tensor,
    regions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """In float32, or float64 if q is, with every score in memory. Shapes as in `consistory.kernels.extended_attention`.

    key_mask may also be soft, float [A, P] in [0, 1]: a key's softmax weight is multiplied by its mask value.
    """
    query, key, value, anchor_key, anchor_value = (at_least_float32(x) for x in (q, k, v, anchor_k, anchor_v))
    patches, head_size = q.shape[3:]
    log_mask = (share[:, :, None] * key_mask).to(query.dtype).log()  # [N, A, P]: log M, -inf where nothing is read

    own = torch.einsum("gnhpd,gnhsd->gnhps", query, key) / head_size**0.5
    shared = torch.einsum("gnhpd,gahsd->gnhpas", query, anchor_key) / head_size**0.5
    shared = shared + log_mask[:, None, None]
    if regions is not None:
        query_region, key_region = regions
        readable = query_region[:, :, None, None] & key_region != 0  # [N, P, A, P]
        shared = shared.masked_fill(~readable[:, None], -torch.inf)

    joined = torch.cat([own, shared.flatten(-2)], dim=-1).softmax(dim=-1)
    p_own, p_shared = joined[..., :patches], joined[..., patches:].unflatten(-1, (-1, patches))
    out = torch.einsum("gnhps,gnhsd->gnhpd", p_own, value)
    out = out + torch.einsum("gnhpas,gahsd->gnhpd", p_shared, anchor_value)
    return out.to(q.dtype)
