"""Controls in a story: what they change, in which pictures and at which steps; in a kept subject; what does not fit."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity import randomise, relative_error
from safetensors.torch import load_file, save_file
from test_story import make_plan, noise, unet  # noqa: F401  (a fixture)
from torch import Tensor

from consistory import ConsiStory, ConsistoryConfig, ConsistoryError, Story
from consistory.attention import AttentionControl
from consistory.config import ControlNetConfig
from consistory.controlnet import Control, ControlNet, Residuals, Steering, acting_steps, add_residuals
from consistory.story import tell
from consistory.subject import Subject, fingerprint
from consistory.unet import Conditioning, Encoded, UNet

SIZE = {"width": 96, "height": 64, "steps": 6}
SETTINGS = ["on the beach", "in the snow", "in space", "at home"]


def make_net(folder: Path, seed: int) -> Path:
    """A folder with a random ControlNet for the recorded model."""
    unet_json = json.loads((folder / "unet" / "config.json").read_text("utf-8"))
    config = {k: v for k, v in unet_json.items() if k not in ("out_channels", "sample_size", "up_block_types")}
    config |= {"_class_name": "ControlNetModel", "conditioning_embedding_out_channels": [4, 4, 6, 8]}
    net = ControlNet(ControlNetConfig.from_json(config))
    randomise(net, seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(2 if "cond_embedding" in name else 0.3 if "controlnet_" in name else 1)
    made = folder.parent / f"control-{seed}"
    made.mkdir(exist_ok=True)
    (made / "config.json").write_text(json.dumps(config))
    save_file(net.state_dict(), made / "diffusion_pytorch_model.safetensors")
    return made


@pytest.fixture(scope="module")
def folders(golden_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    model = tmp_path_factory.mktemp("controls") / "weights"
    model.symlink_to(golden_weights)
    return [make_net(model, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def pipe(golden_weights: Path) -> ConsiStory:
    """In float64, where no rounding error carries a patch over a threshold."""
    return ConsiStory.from_pretrained(golden_weights, dtype=torch.float64)


@pytest.fixture(scope="module")
def nets(folders: list[Path]) -> list[ControlNet]:
    return [ControlNet.from_pretrained(folder, dtype=torch.float64) for folder in folders]


def pictures(n: int, size: tuple[int, int] = (64, 96), seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)


def draw(
    pipe: ConsiStory, controls: Sequence[Control] = (), settings: Sequence[str] = SETTINGS[:3], **others: Any
) -> Story:
    return pipe(subject="a cute dog", settings=settings, seed=3, controls=controls, **SIZE, **others)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def differ(a: Tensor, b: Tensor) -> list[bool]:
    """Picture by picture."""
    return [(x - y).abs().max().item() > 1e-3 for x, y in zip(a, b, strict=True)]


# --- the algorithm ----------------------------------------------------------------------------------------------------


class SteeredUNet(UNet):
    """Adds residuals itself, to whatever call: what a story with controls has to amount to."""

    def steer(self, net: ControlNet, cond: Conditioning, hint: Tensor, weight: float) -> None:
        self.given = net, cond, hint, weight

    def encode(self, x: Tensor, t: Tensor | int, cond: Conditioning, control: AttentionControl) -> Encoded:
        net, own_cond, hint, weight = self.given
        residuals = net(x, t, own_cond, hint)
        weighted = Residuals(weight * residuals.x, tuple(weight * skip for skip in residuals.skips))
        return add_residuals(super().encode(x, t, cond, control), [weighted])


@torch.no_grad()
@pytest.mark.parametrize("preset", ["default", "reference", "vanilla"])
def test_every_call_gets_the_residuals(unet: UNet, preset: str) -> None:  # noqa: F811
    """The consistent and the vanilla call, of both passes and both halves."""
    config = {"default": ConsistoryConfig(), "reference": ConsistoryConfig.reference()}.get(preset)
    plan = make_plan(unet, config or ConsistoryConfig.vanilla(), steps=10)
    net = ControlNet(ControlNetConfig(unet.config, 3, (4, 4)))
    randomise(net, 5)
    for parameter in (*net.controlnet_down_blocks.parameters(), *net.controlnet_mid_block.parameters()):
        parameter.mul_(0.2)
    net.double()  # as the UNet is
    hint = net.hint(torch.rand(6, 3, 16, 24, generator=torch.Generator().manual_seed(1)).double())
    steered = SteeredUNet(unet.config).eval().double()
    steered.load_state_dict(unet.state_dict())
    steered.steer(net, plan.cond, hint, 0.6)

    steering = Steering(net, torch.arange(6), plan.cond, hint, 0.6, frozenset(range(10)))
    ours = tell(replace(plan, controls=(steering,)), noise(plan))
    expected = tell(replace(plan, unet=steered), noise(plan))
    assert relative_error(ours.latents, expected.latents) <= 1e-5
    assert all(torch.equal(ours.masks[s], expected.masks[s]) for s in expected.masks)
    assert relative_error(tell(plan, noise(plan)).latents, expected.latents) > 0.01


def test_two_controls_add_up(pipe: ConsiStory, nets: list[ControlNet]) -> None:
    first, second = Control(nets[0], pictures(3), weight=0.5), Control(nets[1], pictures(3, seed=1))
    both = draw(pipe, [first, second])
    assert_close(draw(pipe, [second, first]).latents, both.latents)
    assert all(differ(draw(pipe, [first]).latents, both.latents))
    halves = [replace(first, weight=0.2), replace(first, weight=0.3), second]
    assert_close(draw(pipe, halves).latents, both.latents)


def test_weight_zero_is_no_control(pipe: ConsiStory, nets: list[ControlNet]) -> None:
    config = ConsistoryConfig()
    without = draw(pipe, [Control(nets[0], pictures(3), weight=0.0)], config=config)
    assert torch.equal(without.latents, draw(pipe, config=config).latents)


def test_one_picture_for_all_is_the_same_for_each(pipe: ConsiStory, nets: list[ControlNet]) -> None:
    one = pictures(1)
    shared = draw(pipe, [Control(nets[0], one)])
    assert_close(draw(pipe, [Control(nets[0], one.repeat(3, axis=0))]).latents, shared.latents)
    assert_close(draw(pipe, [Control(nets[0], [one[0]] * 3)]).latents, shared.latents)
    assert all(differ(draw(pipe, [Control(nets[0], pictures(3, seed=1))]).latents, shared.latents))


def test_each_picture_is_steered_by_its_own(pipe: ConsiStory, nets: list[ControlNet]) -> None:
    vanilla = ConsistoryConfig.vanilla()
    images = pictures(3)
    before = draw(pipe, [Control(nets[0], images)], config=vanilla)
    other = images.copy()
    other[1] = pictures(1, seed=1)[0]
    after = draw(pipe, [Control(nets[0], other)], config=vanilla)
    assert differ(after.latents, before.latents) == [False, True, False]


def test_some_pictures_only(pipe: ConsiStory, nets: list[ControlNet]) -> None:
    vanilla = ConsistoryConfig.vanilla()
    plain = draw(pipe, config=vanilla).latents
    images = pictures(2)
    some = draw(pipe, [Control(nets[0], images, only=[2, 0])], config=vanilla).latents
    assert differ(some, plain) == [True, False, True]
    everywhere = draw(pipe, [Control(nets[0], images[[1, 0, 0]])], config=vanilla).latents
    assert differ(some, everywhere) == [False, True, False]


@pytest.mark.parametrize(
    "start, end, steps, expected",
    [
        (0, 1, 5, [0, 1, 2, 3, 4]), (0.2, 1, 10, [2, 3, 4, 5, 6, 7, 8, 9]), (0, 0.5, 10, [0, 1, 2, 3, 4]),
        (0.7, 0.9, 10, [7, 8]), (0.25, 0.75, 5, [2]), (0.5, 0.55, 10, []),
    ],
)  # fmt: skip
def test_steps_it_acts_at(start: float, end: float, steps: int, expected: list[int]) -> None:
    """As diffusers has it: those that lie whole between the two."""
    assert acting_steps(start, end, steps) == expected


def test_start_and_end_leave_other_steps_alone(
    pipe: ConsiStory, nets: list[ControlNet], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = ControlNet.forward

    def watched(self: ControlNet, x: Tensor, t: int, *rest: Any) -> Residuals:
        seen.append(t)
        return forward(self, x, t, *rest)

    monkeypatch.setattr(ControlNet, "forward", watched)
    draw(pipe, [Control(nets[0], pictures(1), start=1 / 3, end=2 / 3)], config=ConsistoryConfig.vanilla())
    assert seen == [499, 333]  # of 831, 665, 499, 333, 167, 1


def test_dropout_is_the_papers_by_default(pipe: ConsiStory, nets: list[ControlNet]) -> None:
    control = Control(nets[0], pictures(1))
    assert draw(pipe, [control]).settings["config"]["dropout"] == 0.7
    assert draw(pipe).settings["config"]["dropout"] == 0.5
    assert draw(pipe, [control], config=ConsistoryConfig()).settings["config"]["dropout"] == 0.5
    assert ConsistoryConfig.control() == replace(ConsistoryConfig(), dropout=0.7)


def test_pictures_of_another_size_are_stretched_and_told(
    pipe: ConsiStory, nets: list[ControlNet], caplog: pytest.LogCaptureFixture
) -> None:
    small = np.full((8, 8, 3), 200, dtype=np.uint8)
    fits = np.full((64, 96, 3), 200, dtype=np.uint8)
    with caplog.at_level(logging.WARNING, "consistory"):
        wanted = draw(pipe, [Control(nets[0], [fits])])
        assert not caplog.messages
        stretched = draw(pipe, [Control(nets[0], [small])])
    assert caplog.messages == ["control pictures of 8x8 are stretched to 96x64"]
    assert torch.equal(stretched.latents, wanted.latents)


def test_the_record_names_the_controls(pipe: ConsiStory, nets: list[ControlNet]) -> None:
    images = pictures(3)
    story = draw(pipe, [Control(nets[0], images, weight=0.5, end=0.5)])
    (record,) = json.loads(json.dumps(story.settings))["controls"]
    digests = record.pop("images")
    assert record.pop("fingerprint") == fingerprint(nets[0]) != fingerprint(nets[1])
    assert record == {"net": nets[0].name, "weight": 0.5, "start": 0.0, "end": 0.5, "only": None}
    assert len(set(digests)) == 3 and all(len(digest) == 64 for digest in digests)


def test_numbers_of_numpys_end_up_in_the_record(nets: list[ControlNet]) -> None:
    control = Control(nets[0], pictures(1), weight=np.float32(0.5), end=np.float64(0.5), only=np.flatnonzero([0, 1, 1]))
    record = json.loads(json.dumps(control.settings()))
    assert (record["weight"], record["end"], record["only"]) == (0.5, 0.5, [1, 2])


# --- a subject that is kept -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controls(nets: list[ControlNet]) -> list[Control]:
    return [Control(nets[0], pictures(4)), Control(nets[1], pictures(2, seed=1), weight=0.5, only=[1, 3])]


@pytest.fixture(scope="module")
def whole(pipe: ConsiStory, controls: list[Control]) -> Story:
    return draw(pipe, controls, SETTINGS)


def half(controls: list[Control], images: slice, image: slice) -> list[Control]:
    """What steers the first or the last two of the four pictures."""
    all_of_them, some = controls
    return [replace(all_of_them, images=all_of_them.images[images]), replace(some, images=some.images[image], only=[1])]


@pytest.fixture(scope="module")
def of_anchors(controls: list[Control]) -> list[Control]:
    return half(controls, slice(0, 2), slice(0, 1))


@pytest.fixture(scope="module")
def of_new_pictures(controls: list[Control]) -> list[Control]:
    return half(controls, slice(2, 4), slice(1, 2))


@pytest.fixture(scope="module")
def anchors(pipe: ConsiStory, of_anchors: list[Control]) -> Story:
    return draw(pipe, of_anchors, SETTINGS[:2])


@pytest.mark.parametrize("chunk", [None, 1])
def test_extending_is_like_one_large_story(
    anchors: Story, whole: Story, of_new_pictures: list[Control], chunk: int | None
) -> None:
    more = anchors.subject.extend(SETTINGS[2:], controls=of_new_pictures, chunk=chunk)
    assert_close(more.latents, whole.latents[2:])


def test_new_pictures_need_no_control(anchors: Story, pipe: ConsiStory, of_anchors: list[Control]) -> None:
    free = anchors.subject.extend(SETTINGS[2:])
    first, second = of_anchors
    assert_close(free.latents, draw(pipe, [replace(first, only=[0, 1]), second], SETTINGS).latents[2:])


def test_the_anchors_of_a_large_story_keep_their_controls(anchors: Story, whole: Story) -> None:
    more = [story.subject.extend(["in a meadow"], seed=9).latents for story in (whole, anchors)]
    assert_close(*more)


def test_a_saved_subject_goes_on(
    anchors: Story, whole: Story, pipe: ConsiStory, of_new_pictures: list[Control], tmp_path: Path
) -> None:
    """With ControlNets that are given, and with those that it finds where they were."""
    path = tmp_path / "dog.safetensors"
    anchors.subject.save(path)
    given = [control.net for control in of_new_pictures]
    for nets in (given, given[:1], []):
        loaded = Subject.load(path, pipe, nets)
        assert_close(loaded.extend(SETTINGS[2:], controls=of_new_pictures).latents, whole.latents[2:])
    assert [control.net for control in Subject.load(path, pipe, given).controls] == given


def test_a_saved_subject_whose_controlnet_is_gone(anchors: Story, pipe: ConsiStory, tmp_path: Path) -> None:
    path = tmp_path / "dog.safetensors"
    nets = [renamed(control.net, tmp_path / "gone") for control in anchors.subject.controls]
    elsewhere = [replace(control, net=net) for control, net in zip(anchors.subject.controls, nets, strict=True)]
    replace(anchors.subject, controls=elsewhere).save(path)
    with pytest.raises(ConsistoryError, match=r"drawn with the ControlNet .*gone.*no folder"):
        Subject.load(path, pipe)
    assert len(Subject.load(path, pipe, nets).controls) == 2


def renamed(net: ControlNet, name: Path) -> ControlNet:
    other = ControlNet.from_pretrained(net.name, dtype=torch.float64)
    other.name = str(name)
    return other


def test_a_saved_subject_whose_controlnet_is_another_now(anchors: Story, pipe: ConsiStory, tmp_path: Path) -> None:
    first, second = anchors.subject.controls
    moved = renamed(first.net, Path(second.net.name))
    replace(anchors.subject, controls=[replace(first, net=moved)]).save(tmp_path / "dog.safetensors")
    with pytest.raises(ConsistoryError, match="another ControlNet"):
        Subject.load(tmp_path / "dog.safetensors", pipe)


def test_a_loaded_recording_of_a_steered_subject_is_not_saved_again(
    anchors: Story, pipe: ConsiStory, tmp_path: Path
) -> None:
    """It goes on without the ControlNets, which were not loaded; what would be saved would lack them."""
    anchors.subject.record(tmp_path / "dog.safetensors")
    loaded = Subject.load(tmp_path / "dog.safetensors", pipe)
    expected = anchors.subject.extend(["in a meadow"], seed=9)
    assert_close(loaded.extend(["in a meadow"], seed=9).latents, expected.latents)
    for again in (loaded.save, loaded.record):
        with pytest.raises(ConsistoryError, match="keep the recording"):
            again(tmp_path / "again.safetensors")


def test_a_subject_without_controls_is_as_small_as_ever(pipe: ConsiStory, tmp_path: Path) -> None:
    draw(pipe).subject.save(tmp_path / "dog.safetensors")
    assert all(key.startswith("masks") for key in load_file(tmp_path / "dog.safetensors"))


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"images": pictures(2)}, "has 2 pictures to steer 3"),
        ({"images": pictures(0)}, "has 0 pictures"),
        ({"images": pictures(2), "only": [0]}, "has 2 pictures to steer 1"),
        ({"only": [3]}, r"steers pictures \[3\]: use numbers from 0 to 2"),
        ({"only": [-1]}, "use numbers from 0 to 2"),
        ({"only": [1, 1]}, "each once"),
        ({"only": []}, "use numbers"),
        ({"start": 0.5, "end": 0.55}, "none of 6 steps"),
    ],
)
def test_controls_that_do_not_fit_the_story(
    pipe: ConsiStory, nets: list[ControlNet], changed: dict[str, Any], says: str
) -> None:
    control = replace(Control(nets[0], pictures(1)), **changed)
    with pytest.raises(ConsistoryError, match=says):
        draw(pipe, [control], on_step=lambda done, total: pytest.fail("work was done"))


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"images": pictures(1)[0]}, r"uint8 \[96, 3\]"),
        ({"images": pictures(1)[..., :1]}, r"uint8 \[64, 96, 1\]"),
        ({"images": pictures(1) / 255}, r"float64 \[64, 96, 3\]"),
        ({"images": ["pose.png"]}, "is str: give arrays"),
        ({"images": torch.zeros(1, 64, 96, 3, dtype=torch.uint8)}, "is Tensor: give arrays"),
        ({"weight": float("nan")}, "weight is nan: give a finite number"),
        ({"weight": "0.8"}, "weight is '0.8': give a finite number"),
        ({"only": [0.0]}, "picture's number is 0.0: give a whole number"),
        ({"start": 0.6, "end": 0.4}, "from 0.6 to 0.4"),
        ({"start": -0.1}, "from -0.1"),
        ({"end": 1.5}, "to 1.5"),
    ],
)
def test_values_out_of_range(nets: list[ControlNet], changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConsistoryError, match=says):
        Control(**{"net": nets[0], "images": pictures(1), **changed})


def test_a_controlnet_of_another_model(pipe: ConsiStory) -> None:
    config = ControlNetConfig(replace(pipe.unet.config, context_width=64), 3, (4, 4, 6, 8))
    with pytest.raises(ConsistoryError, match="another model"):
        draw(pipe, [Control(ControlNet(config), pictures(1))])
    with pytest.raises(ConsistoryError, match="another model"):
        draw(pipe, [Control(ControlNet(ControlNetConfig(pipe.unet.config, 3, (4, 8))), pictures(1))])


def test_a_controlnet_in_another_precision(pipe: ConsiStory, folders: list[Path]) -> None:
    net = ControlNet.load(folders[0], dtype=torch.float16)
    with pytest.raises(ConsistoryError, match=r"float16 on cpu: load it with the model's dtype=torch\.float64"):
        draw(pipe, [Control(net, pictures(1))])


def test_new_pictures_and_their_controls_fit(anchors: Story, nets: list[ControlNet]) -> None:
    with pytest.raises(ConsistoryError, match="3 pictures to steer 2"):
        anchors.subject.extend(SETTINGS[2:], controls=[Control(nets[0], pictures(3))], chunk=1)
