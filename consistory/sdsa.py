"""The two controls of a consistent step: one records vanilla queries, the other shares the subject between images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from consistory.kernels.cross_attention import cross_attention
from consistory.kernels.extended_attention import extended_attention

from .attention import AttentionControl, Site
from .injection import Injection
from .recording import CallRecorder, RecordedCall


class RecordQueries(AttentionControl):
    """Plain attention that keeps the decoder's self-attention queries: Q_vanilla of eq. 4."""

    def __init__(self) -> None:
        self.queries: dict[Site, Tensor] = {}

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if site.part == "decoder":
            self.queries[site] = q
        return super().self_attention(q, k, v, site)


@dataclass(frozen=True)
class Sharing:
    """Who reads what in subject-driven self-attention (eqs. 2-3).

    key_masks: {stride: bool [A, P]} subject patches of the anchors that survived dropout.
    share: bool [N, A], True where image i reads anchor a. An anchor has all its own keys already.
    vanilla: queries to blend in and their weight v (eq. 4), or None.
    regions: {stride: bit sets int32, of queries [N, P] and keys [A, P]}, see `region_bits`: a query reads only those
        kept keys that have a bit in common with it. Empty: it reads all.
    align_keys: whoever reads an anchor reads its keys with the statistics of its own keys (App. E).
    """

    key_masks: dict[int, Tensor]
    share: Tensor
    vanilla: tuple[RecordQueries, float] | None
    regions: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    align_keys: bool = False


@dataclass
class Consistent(AttentionControl):
    """One consistent call of the UNet on N images: N conditional samples, after their N unconditional twins if guided.

    token_weights: [N, T, K] which tokens are concept k, each column's weights adding up to 1.
    map_stride: stride of the cross-attention layers that tell where the subject is: the coarsest attended.
    sharing: subject-driven self-attention in the decoder, or None.
    injection: feature injection at stride `injection_stride`, or None.
    recorded: the anchors, if they are not among the N images.
    recorder: writes down what later images will need of the anchors that are, or None.
    """

    token_weights: Tensor
    map_stride: int
    sharing: Sharing | None = None
    injection: Injection | None = None
    injection_stride: int = 0
    recorded: RecordedCall | None = None
    recorder: CallRecorder | None = None
    cross_maps: list[Tensor] = field(default_factory=list)  # one [N, P, K] per layer, recorded during the call
    dift: Tensor | None = None  # [N, C, h, w], recorded during the call

    @property
    def images(self) -> int:
        return len(self.token_weights)

    def self_input(self, x: Tensor, site: Site) -> None:
        if self.recorder is not None and self.sharing is not None and site.part == "decoder":
            self.recorder.input(rearrange(x, "(g n) p c -> g n p c", n=self.images), site)

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Eqs. 2-3: queries of image i see its own patches and the subject patches of every anchor it reads."""
        if self.sharing is None or site.part != "decoder":
            return super().self_attention(q, k, v, site)
        q, k, v = (rearrange(y, "(g n) h p d -> g n h p d", n=self.images) for y in (q, k, v))
        attend: Callable[..., Tensor] = aligned_attention if self.sharing.align_keys else extended_attention
        if self.recorded is not None:
            anchor_k, anchor_v = self.recorded.keys_values(site)
            attend = partial(attend, anchor_k=anchor_k, anchor_v=anchor_v)
        out = attend(
            q, k, v, self.sharing.key_masks[site.stride], self.sharing.share, q_blend=self._vanilla_queries(site),
            regions=self.sharing.regions.get(site.stride),
        )  # fmt: skip
        return rearrange(out, "g n h p d -> (g n) h p d")

    def _vanilla_queries(self, site: Site) -> tuple[Tensor, float] | None:
        assert self.sharing is not None
        if self.sharing.vanilla is None:
            return None
        recorded, weight = self.sharing.vanilla
        return rearrange(recorded.queries[site], "(g n) h p d -> g n h p d", n=self.images), weight

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Eq. 7's input: the conditional half's probabilities of the concept tokens, averaged over heads."""
        if site.stride != self.map_stride or not self.token_weights.shape[-1]:
            return super().cross_attention(q, k, v, site)
        n = self.images
        conditional, cross_map = cross_attention(q[-n:], k[-n:], v[-n:], self.token_weights)
        self.cross_maps.append(cross_map)
        if len(q) == n:
            return conditional
        return torch.cat([F.scaled_dot_product_attention(q[:n], k[:n], v[:n]), conditional])

    def self_output(self, x: Tensor, site: Site) -> Tensor:
        if self.injection is None or site.stride != self.injection_stride or site.part == "mid":
            return x
        conditional = self.injection(x[-self.images :], self.recorded.output(site) if self.recorded else None)
        if self.recorder is not None:
            self.recorder.output(conditional, site)
        return torch.cat([x[: -self.images], conditional])

    def decoder_features(self, x: Tensor, index: int) -> None:
        """DIFT features are the first decoder block's output for the conditional images."""
        if index == 0:
            self.dift = x[-self.images :].clone()  # without the unconditional half


def align_keys(keys: Tensor, to: Tensor) -> Tensor:
    """AdaIN (Huang & Belongie 2017) of an anchor's keys: for each head and channel, mean and standard deviation over
    the patches become those of the keys `to`. Both [..., H, P, d], every patch counted.
    """
    std, mean = torch.std_mean(keys, dim=-2, correction=0, keepdim=True)
    to_std, to_mean = torch.std_mean(to, dim=-2, correction=0, keepdim=True)
    return (keys - mean) / std * to_std + to_mean


def aligned_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, share: Tensor, *, q_blend: tuple[Tensor, float] | None = None,
    regions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Extended attention with the anchors' keys aligned to those of the image that reads them. Shapes as there.

    Aligning to each image by itself keeps a picture independent of what else is in its batch.
    """
    anchors = len(key_mask)

    def attend(i: int) -> Tensor:
        own = slice(i, i + 1)
        blend = q_blend and (q_blend[0][:, own], q_blend[1])
        bits = regions and (regions[0][own], regions[1])
        anchor_k = align_keys(k[:, :anchors], to=k[:, own])
        return extended_attention(
            q[:, own], k[:, own], v[:, own], key_mask, share[own], anchor_k=anchor_k, anchor_v=v[:, :anchors],
            q_blend=blend, regions=bits,
        )  # fmt: skip

    return torch.cat([attend(i) for i in range(q.shape[1])], dim=1)
