"""Anchors on disk (§4.4): what other pictures need of the anchors is recorded while these are drawn, and read back.

Others need little of an anchor, and nothing flows back to it:

- for shared attention (eqs. 2-3), in every decoder layer at every step of either pass, its keys and values where the
  key mask lets others read them. Both are linear in the layer's input, so the input is what is kept, half as much; who
  reads it applies the projections again, about a hundredth of the layer's work. The key masks are kept along with it;
- for injection (eq. 6), at its steps of the second pass, x_out as injection has left it, where the anchor's final mask
  is: no patch outside can be a source;
- for correspondence (eqs. 8-9), its DIFT features and its final masks.

All is kept in the precision of the model, so nothing is rounded. A step takes 2 A (sum over decoder layers of kept keys
x width) values, one with injection A (sum over its layers of patches in the mask x width) more: for SDXL at 1024 x 1024
in float16, with two anchors, 50 steps and an eighth of the keys kept, 4.8 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from .attention import Attention, Site, TransformerBlock
from .tensorfile import TensorFile
from .unet import UNet

Call = tuple[int, int]  # the pass, 1 or 2, and the step


class Recorder:
    """Writes a recording while the anchors are drawn."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._source_mask: Tensor | None = None

    def call(self, call: Call, key_masks: Mapping[int, Tensor]) -> CallRecorder:
        """key_masks: {stride: bool [A, P]} patches of the anchors that others read; empty where they read none."""
        for stride, mask in key_masks.items():
            self._file.write(_mask_name(call, stride), mask)
        return CallRecorder(self._file, call, key_masks, self._source_mask)

    def subject(self, dift: Tensor, masks: Mapping[int, Tensor]) -> None:
        """The anchors' DIFT features [A, C, h, w], not yet smoothed, and final masks {stride: bool [A, P]}."""
        self._file.write("dift", dift)
        for stride, mask in masks.items():
            self._file.write(f"masks.{stride}", mask)
        self._source_mask = masks[min(masks)]


@dataclass(frozen=True)
class CallRecorder:
    """Writes one call of the UNet. source_mask: bool [A, P] patches that others draw from, once that is known."""

    file: TensorFile
    call: Call
    key_masks: Mapping[int, Tensor]
    source_mask: Tensor | None

    def input(self, x: Tensor, site: Site) -> None:
        """What the images' keys and values are made of, [G, N, P, C], anchors first; G = 2 if guided, else 1."""
        mask = self.key_masks[site.stride]
        self.file.write(_name(self.call, "input", site), x[:, : len(mask)][:, mask])

    def output(self, x: Tensor, site: Site) -> None:
        """Injected x_out [N, P, C], anchors first."""
        assert self.source_mask is not None
        self.file.write(_name(self.call, "output", site), x[: len(self.source_mask)][self.source_mask])


class Recorded:
    """A recording, mapped into memory: each layer's part is read when the layer runs.

    The UNet may have another device or precision than the one that was recorded.
    """

    def __init__(self, path: str | Path, unet: UNet) -> None:
        self.path = Path(path).resolve()
        self.layers = self_attentions(unet)
        self._file = safe_open(path, "pt")
        self._names = set(self._file.keys())
        self._unet = unet

    def __reduce__(self) -> tuple[type[Recorded], tuple[Path, UNet]]:
        """Copies open the file again, which cannot be copied."""
        return Recorded, (self.path, self._unet)

    def call(self, call: Call) -> RecordedCall:
        return RecordedCall(self, call, self._masks({s: _mask_name(call, s) for s in self._unet.strides}))

    @property
    def dift(self) -> Tensor:
        """[A, C, h, w], not yet smoothed."""
        return self.rows("dift")

    @cached_property
    def masks(self) -> dict[int, Tensor]:
        """{stride: bool [A, P]}, the final ones; empty without injection."""
        return self._masks({s: f"masks.{s}" for s in self._unet.strides})

    def rows(self, name: str) -> Tensor:
        return self._file.get_tensor(name).to(self._unet.conv_in.weight)

    def _masks(self, names: Mapping[int, str]) -> dict[int, Tensor]:
        device = self._unet.conv_in.weight.device
        return {s: self._file.get_tensor(name).to(device) for s, name in names.items() if name in self._names}


@dataclass(frozen=True)
class RecordedCall:
    """The anchors in one call of the UNet. key_masks: as they were recorded."""

    recorded: Recorded
    call: Call
    key_masks: dict[int, Tensor]

    def keys_values(self, site: Site) -> tuple[Tensor, Tensor]:
        """Keys and values of the anchors where the key mask is, [G, A, H, P, d] each."""
        x, mask = self.recorded.rows(_name(self.call, "input", site)), self.key_masks[site.stride]
        k, v = self.recorded.layers[site].keys_values(x)
        return spread(k, mask).movedim(2, 1), spread(v, mask).movedim(2, 1)

    def output(self, site: Site) -> Tensor:
        """Injected x_out of the anchors where their final mask is, [A, P, C]."""
        return spread(self.recorded.rows(_name(self.call, "output", site)), self.recorded.masks[site.stride])


def spread(rows: Tensor, mask: Tensor) -> Tensor:
    """Rows [..., R, D] to the R places of a mask, bool [A, P] -> [..., A, P, D].

    Elsewhere are copies, which nobody reads: so the host need not wait to know the places.
    """
    if not rows.shape[-2]:
        return rows.new_zeros(*rows.shape[:-2], *mask.shape, rows.shape[-1])
    source = (mask.flatten().cumsum(0) - 1).clamp(min=0)
    return rows.index_select(-2, source).unflatten(-2, mask.shape)


def most_tensors(unet: UNet, steps: int) -> int:
    """How many tensors a recording can have at most."""
    return 2 * steps * (len(self_attentions(unet)) + len(unet.strides)) + len(unet.strides) + 2


def self_attentions(unet: UNet) -> dict[Site, Attention]:
    return {block.site: block.attn1 for block in unet.modules() if isinstance(block, TransformerBlock)}


def _name(call: Call, what: str, site: Site) -> str:
    return f"{call[0]}.{call[1]}.{what}.{site.part}.{site.index}"


def _mask_name(call: Call, stride: int) -> str:
    return f"{call[0]}.{call[1]}.keys.{stride}"
