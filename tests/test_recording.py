"""Extras that join recorded anchors come out as in one story with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_story
import torch
from parity import randn
from safetensors.torch import load_file
from test_story import CONFIGS, VANILLA, Counting, make_plan, noise
from torch import Tensor

from consistory import ConsistoryConfig
from consistory.attention import AttentionControl
from consistory.recording import CallRecorder, Recorded, Recorder, most_tensors, self_attentions, spread
from consistory.story import Plan, Told, tell
from consistory.tensorfile import TensorFile
from consistory.unet import Conditioning, UNet

unet = test_story.unet  # a fixture
ANCHORS, IMAGES = 2, 6
FILE = "anchors.safetensors"
TOLERANCE = 1e-4  # latents are about 20


def part(plan: Plan, images: slice, **changes: Any) -> Plan:
    """The plan of some of its images."""

    def both(x: Tensor) -> Tensor:
        return x.unflatten(0, (2, -1))[:, images].flatten(0, 1)

    cond = Conditioning(*(both(getattr(plan.cond, name)) for name in ("context", "pooled", "sizes")))
    return replace(plan, cond=cond, token_weights=plan.token_weights[images], **changes)


@torch.no_grad()
def record(plan: Plan, path: Path) -> Told:
    """Tell the anchors alone, and record them."""
    anchors = slice(plan.anchors)
    with TensorFile(path, {}, most_tensors(plan.unet, plan.steps)) as file:
        return tell(part(plan, anchors, recorder=Recorder(file)), noise(plan)[anchors])


@torch.no_grad()
def join(plan: Plan, path: Path, images: slice) -> Told:
    return tell(part(plan, images, recorded=Recorded(path, plan.unet)), noise(plan)[images])


# Subjects that are kept separate are not recorded: see `Subject.recording`.
RECORDED = {name: config for name, config in CONFIGS.items() if not config.separate_subjects} | {"vanilla": VANILLA}


@torch.no_grad()
@pytest.mark.parametrize("name", RECORDED)
def test_extras_come_out_as_in_one_story(unet: UNet, name: str, tmp_path: Path) -> None:
    plan = make_plan(unet, RECORDED[name], images=IMAGES, anchors=ANCHORS)
    whole = tell(plan, noise(plan))
    anchors = record(plan, tmp_path / FILE)
    torch.testing.assert_close(anchors.latents, whole.latents[:ANCHORS], atol=TOLERANCE, rtol=0)
    for images in (slice(ANCHORS, None), slice(4, 5)):
        told = join(plan, tmp_path / FILE, images)
        torch.testing.assert_close(told.latents, whole.latents[images], atol=TOLERANCE, rtol=0)
        assert told.masks.keys() == whole.masks.keys()
        for stride, mask in told.masks.items():
            assert torch.equal(mask, whole.masks[stride][images])
            assert torch.equal(told.nearest[stride].index, whole.nearest[stride].index[images])


@torch.no_grad()
@pytest.mark.parametrize("steps, anchors", [(1, 2), (2, 3), (5, 1), (11, 3)])
def test_any_number_of_steps_and_anchors(unet: UNet, steps: int, anchors: int, tmp_path: Path) -> None:
    plan = make_plan(unet, ConsistoryConfig.reference(), images=anchors + 1, anchors=anchors, steps=steps)
    whole = tell(plan, noise(plan))
    record(plan, tmp_path / FILE)
    told = join(plan, tmp_path / FILE, slice(anchors, None))
    torch.testing.assert_close(told.latents, whole.latents[anchors:], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_an_anchor_without_a_subject_can_be_recorded(unet: UNet, tmp_path: Path) -> None:
    """The first anchor's map is constant: its masks are empty, and nobody reads it."""
    plan = make_plan(unet, images=3)
    plan.token_weights[:2] = 0
    whole = tell(plan, noise(plan))
    assert not whole.masks[2][:2].any() and whole.masks[2][2].any()
    record(plan, tmp_path / FILE)
    told = join(plan, tmp_path / FILE, slice(2, 3))
    torch.testing.assert_close(told.latents, whole.latents[2:], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_extras_depend_on_what_is_recorded(unet: UNet, tmp_path: Path) -> None:
    plan = make_plan(unet)
    record(plan, tmp_path / FILE)
    before = join(plan, tmp_path / FILE, slice(2, 3)).latents
    for kind in (".input.", ".output.", "dift", "masks.2"):
        tensors = load_file(tmp_path / FILE)
        with TensorFile(tmp_path / "other", {}, len(tensors)) as file:
            for name, x in tensors.items():
                file.write(name, x.flip(-1) if kind in name else x)
        assert (join(plan, tmp_path / "other", slice(2, 3)).latents - before).abs().max() > 1e-4, kind


@torch.no_grad()
@pytest.mark.parametrize("name", ["default", "reference", "no-sdsa"])
def test_no_anchor_is_run_again(unet: UNet, name: str, tmp_path: Path) -> None:
    class Sizes(Counting):
        def encode(self, x: Tensor, t: Any, cond: Conditioning, control: AttentionControl) -> Any:
            sizes.append(len(x))
            return super().encode(x, t, cond, control)

    sizes: list[int] = []
    plan = make_plan(unet, CONFIGS[name], images=IMAGES, anchors=ANCHORS)
    record(plan, tmp_path / FILE)
    counting = replace(plan, unet=Sizes(unet))  # type: ignore[arg-type]
    join(counting, tmp_path / FILE, slice(ANCHORS, None))
    calls = len(sizes)
    assert calls and set(sizes) == {2 * (IMAGES - ANCHORS)}
    join(counting, tmp_path / FILE, slice(ANCHORS, ANCHORS + 1))
    assert sizes[calls:] == [2] * calls


@torch.no_grad()
def test_an_interrupted_recording_leaves_nothing(unet: UNet, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total - 2:
            raise KeyboardInterrupt

    plan = make_plan(unet, images=2)
    with pytest.raises(KeyboardInterrupt), TensorFile(tmp_path / FILE, {}, most_tensors(unet, 10)) as file:
        tell(replace(plan, recorder=Recorder(file)), noise(plan), interrupt)
    assert not list(tmp_path.iterdir())


# --- what is in it ----------------------------------------------------------------------------------------------------


def values(tensors: Mapping[str, Tensor], kind: str) -> int:
    return sum(x.numel() for name, x in tensors.items() if f".{kind}." in name)


@torch.no_grad()
def test_size_is_as_the_formula_has_it(unet: UNet, tmp_path: Path) -> None:
    """Widths are 16, in 3 decoder layers at stride 2 and 6 at stride 4, and in 2 encoder layers at stride 2."""
    plan = make_plan(unet, images=2)
    record(plan, tmp_path / FILE)
    tensors = load_file(tmp_path / FILE)
    kept = {s: sum(int(x.sum()) for name, x in tensors.items() if name.endswith(f".keys.{s}")) for s in (2, 4)}
    assert values(tensors, "input") == 2 * 16 * (3 * kept[2] + 6 * kept[4]) > 0
    injections = 3  # of 10 steps: 1 ... 3
    assert values(tensors, "output") == injections * (3 + 2) * 16 * tensors["masks.2"].sum() > 0
    assert {name.split(".")[3] for name in tensors if ".input." in name} == {"decoder"}
    assert {name.split(".")[3] for name in tensors if ".output." in name} == {"encoder", "decoder"}
    # Steps after the first, of a first pass of 7 steps to t = 301, and of a second from step 1 on.
    assert {name.split(".")[0] for name in tensors if ".keys." in name} == {"1", "2"}
    assert sum(".keys.2" in name for name in tensors) == 6 + 9
    assert len(tensors) <= most_tensors(unet, plan.steps)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rows_are_kept_bit_for_bit(unet: UNet, dtype: torch.dtype, tmp_path: Path) -> None:
    """Inputs and outputs of 3 images, two of them anchors; each layer's own projections make keys and values again."""
    half = UNet(unet.config).to(dtype)
    half.load_state_dict(unet.state_dict())
    site = next(site for site in self_attentions(half) if site.part == "decoder" and site.stride == 2)
    layer = self_attentions(half)[site]
    mask, source_mask = (randn(2, 24, seed=seed) > 0 for seed in (1, 2))
    x, y = randn(2, 3, 24, 16).to(dtype), randn(3, 24, 16, seed=1).to(dtype)
    with TensorFile(tmp_path / FILE, {}, 4) as file:
        recorder = Recorder(file)
        recorder.subject(randn(2, 3, 4, 6).to(dtype), {2: source_mask})
        call = recorder.call((2, 7), {2: mask})
        call.input(x, site)
        call.output(y, site)
    recorded = Recorded(tmp_path / FILE, half)
    assert torch.equal(recorded.dift, randn(2, 3, 4, 6).to(dtype))
    read = recorded.call((2, 7))
    assert torch.equal(read.key_masks[2], mask)
    assert torch.equal(read.output(site)[source_mask], y[:2][source_mask])
    k, v = read.keys_values(site)
    for actual, projection in ((k, layer.to_k), (v, layer.to_v)):
        assert actual.dtype == dtype and actual.shape == (2, 2, layer.heads, 24, 16 // layer.heads)
        expected = projection(x[:, :2]).unflatten(-1, (layer.heads, -1))  # [G, A, P, H, d]
        torch.testing.assert_close(actual.transpose(2, 3)[:, mask], expected[:, mask])


def test_masked_places_alone_have_meaning() -> None:
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1]], dtype=torch.bool)
    rows = randn(3, 4, 5)
    out = spread(rows, mask)
    assert out.shape == (3, 2, 4, 5)
    assert torch.equal(out[:, mask], rows)
    assert torch.equal(spread(rows[:, :0], torch.zeros_like(mask)), torch.zeros(3, 2, 4, 5))


def test_a_call_without_sharing_records_no_mask(unet: UNet, tmp_path: Path) -> None:
    with TensorFile(tmp_path / FILE, {}, 1) as file:
        assert isinstance(Recorder(file).call((1, 0), {}), CallRecorder)
    assert Recorded(tmp_path / FILE, unet).call((1, 0)).key_masks == {}
    assert Recorded(tmp_path / FILE, unet).masks == {}

