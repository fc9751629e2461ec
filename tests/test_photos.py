"""Real photos as anchors, on the recorded model; how well the subject is kept is measured by bench/photos.py."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from consistory import ConsiStory, ConsistoryConfig, ConsistoryError, Story, ddpm
from consistory.config import PhotoConfig
from consistory.images import every_picture
from consistory.photos import fit_photo, photo_model
from consistory.story import Plan
from consistory.subject import Subject

SETTINGS = ["on the beach", "in the snow", "in space"]
SIZE = {"width": 128, "height": 128, "steps": 4}


def picture(seed: int, height: int = 128, width: int = 128) -> NDArray[np.uint8]:
    """Soft blobs of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def pipe(golden_weights: Path) -> ConsiStory:
    """In float64, where no rounding error carries a patch over a threshold."""
    return ConsiStory.from_pretrained(golden_weights, dtype=torch.float64)


def personalize(pipe: ConsiStory, **options: Any) -> Subject:
    options = {"images": [picture(0), picture(1)], "subject": "a cute dog", **SIZE, **options}
    return pipe.personalize(options.pop("images"), **options)


@pytest.fixture(scope="module")
def subject(pipe: ConsiStory) -> Subject:
    return personalize(pipe)


@pytest.fixture(scope="module")
def story(subject: Subject) -> Story:
    return subject.extend(SETTINGS)


def with_anchors(subject: Subject, settings: list[str], latents: Tensor | None = None) -> Story:
    """A story with its photos, as `extend` draws it before it leaves them out."""
    prompts = [*subject.recipe.prompts, *(f"a cute dog {setting}" for setting in settings)]
    noise = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(5))
    return subject.draw(
        prompts, list(range(len(prompts))), noise, given=None, controls=(), chunk=None,
        on_step=lambda done, total: None, choose=every_picture, on_picture=lambda index, image: None,
    )  # fmt: skip


# --- inversion --------------------------------------------------------------------------------------------------------


def test_inversion_reconstructs_sprites() -> None:
    pipe = ConsiStory.from_pretrained("sprites")
    photos = [picture(seed, 64, 64) for seed in (2, 3)]
    subject = pipe.personalize(photos, subject="a cat", steps=6, seed=[4, 9])
    assert subject.photos is not None
    with torch.inference_mode():
        predict = photo_model(pipe.plan(subject.recipe, subject.recipe.prompts), PhotoConfig())
        inversion = ddpm.invert(predict, subject.photos, [4, 9], pipe.schedule, 6)
        again = ddpm.generate(predict, inversion, pipe.schedule, 6)
        torch.testing.assert_close(again, subject.photos, atol=1e-3, rtol=0)
        error = pipe.decode(again).astype(float) - pipe.decode(subject.photos)
    assert (error**2).mean() < 255**2 * 1e-4  # 40 dB


def test_photos_are_the_latents_means(pipe: ConsiStory, subject: Subject) -> None:
    pixels = torch.from_numpy(np.stack([picture(0), picture(1)])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        means, _ = pipe.vae.encode(pixels.double())
    assert subject.photos is not None
    torch.testing.assert_close(subject.photos, (means * pipe.vae.config.scaling_factor).float(), atol=1e-4, rtol=0)


# --- photos as anchors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["inversion", "noise"])
def test_the_anchors_come_out_as_the_photos(pipe: ConsiStory, method: str) -> None:
    """Whatever the new pictures are, and with feature injection: nothing flows into a photo."""
    subject = personalize(pipe, method=method)
    told = with_anchors(subject, SETTINGS[:1])
    assert subject.photos is not None
    torch.testing.assert_close(told.latents[:2], subject.photos, atol=1e-3, rtol=0)
    assert not told.latents[2].isnan().any()


def test_photos_that_read_each_other_change(pipe: ConsiStory) -> None:
    subject = personalize(pipe, anchors_read=True)
    told = with_anchors(subject, SETTINGS[:1])
    assert subject.photos is not None
    assert (told.latents[:2] - subject.photos).abs().max() > 0.01


def test_photos_are_never_sources_of_each_other(story: Story, subject: Subject) -> None:
    told = with_anchors(subject, SETTINGS[:1])
    for nearest in told.nearest.values():
        assert nearest.distance[:2].isinf().all() and nearest.distance[2].isfinite().all()


def test_new_pictures_depend_on_the_photos(pipe: ConsiStory, story: Story) -> None:
    other = personalize(pipe, images=[picture(0), picture(7)]).extend(SETTINGS)
    assert (other.latents - story.latents).abs().max() > 1e-3


def test_plain_pictures_do_not_depend_on_the_photos(pipe: ConsiStory) -> None:
    plain = personalize(pipe, config=ConsistoryConfig.vanilla()).extend(SETTINGS[:1], seed=5)
    prompts = [f"a cute dog {SETTINGS[0]}"]
    expected = pipe(prompts=prompts, seed=5, config=ConsistoryConfig.vanilla(), **SIZE)
    torch.testing.assert_close(plain.latents, expected.latents, atol=1e-6, rtol=0)


OPTIONS: tuple[dict[str, Any], ...] = (
    {"method": "noise"}, {"align_keys": False}, {"anchors_read": True}, {"seed": 8}, {"clip_skip": 1},
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_changes_the_pictures(pipe: ConsiStory, story: Story, options: dict[str, Any]) -> None:
    other = personalize(pipe, **options).extend(SETTINGS, seed=story.seeds)
    assert (other.latents - story.latents).abs().max() > 1e-4


def test_chunks_do_not_matter(subject: Subject, story: Story) -> None:
    ticks: list[tuple[int, int]] = []
    more = subject.extend(SETTINGS, chunk=1, on_step=lambda done, total: ticks.append((done, total)))
    torch.testing.assert_close(more.latents, story.latents, atol=1e-4, rtol=0)
    assert [done for done, _ in ticks] == list(range(1, ticks[-1][1] + 1))


def test_a_saved_subject_goes_on(subject: Subject, story: Story, pipe: ConsiStory, tmp_path: Path) -> None:
    path = tmp_path / "dog.safetensors"
    story.subject.save(path)
    assert path.stat().st_size < 2 * 4 * 4 * 16 * 16 + 2 * 16 * 16 + 8000  # latents and masks; no noise maps
    loaded = Subject.load(path, pipe)
    assert loaded.recipe == story.subject.recipe
    assert subject.photos is not None and torch.equal(loaded.photos, subject.photos)
    assert all(torch.equal(loaded.masks[stride], mask) for stride, mask in story.subject.masks.items())
    torch.testing.assert_close(loaded.extend(SETTINGS, seed=story.seeds).latents, story.latents, atol=1e-4, rtol=0)


def test_seeds_go_on_after_those_used(story: Story) -> None:
    assert story.seeds == [2, 3, 4] and story.subject.extend(SETTINGS[:1]).seeds == [5]


def test_noise_maps_lead_through_the_noised_latents(pipe: ConsiStory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing flows into a photo, following its noise maps is following its latents, and takes no inversion."""
    subject = personalize(pipe)
    followed = with_anchors(subject, SETTINGS[:1])
    maps = replace(subject.recipe, photos=replace(subject.recipe.photos, anchors_read=True))
    monkeypatch.setattr(Plan, "share", property(lambda plan: torch.tensor([[0, 0], [0, 0], [1, 1]]).bool()))
    by_maps = with_anchors(replace(subject, recipe=maps), SETTINGS[:1])
    torch.testing.assert_close(by_maps.latents, followed.latents, atol=1e-4, rtol=0)


def test_one_photo_is_enough(pipe: ConsiStory) -> None:
    told = personalize(pipe, images=[picture(0)], subject="dog").extend(["in space"])
    assert told.images.shape == (1, 128, 128, 3) and told.prompts == ["dog in space"]
    assert told.settings["photos"]["method"] == "inversion"


def test_prompts_are_plain_unless_given(pipe: ConsiStory) -> None:
    assert personalize(pipe, style="a photo of").recipe.prompts == ["a photo of a cute dog"] * 2
    given = ["a dog on a sofa", "a dog outside"]
    assert personalize(pipe, prompts=given, concepts=["dog"]).recipe.prompts == given


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"images": []}, "no photo"), ({"images": None}, "images are a NoneType: give a list"),
        ({"images": [np.zeros((0, 5, 3), np.uint8)]}, r"uint8 \[0, 5, 3\]"),
        ({"images": "x.png"}, "single photo"), ({"images": picture(0)}, "single photo"),
        ({"images": [picture(0) / 255]}, "float64"), ({"images": [picture(0)[..., 0]]}, "uint8"),
        ({"images": [Path("nothing.png")]}, "no file nothing.png"), ({"method": "magic"}, "magic"),
        ({"prompts": ["a dog"]}, "1 prompts are given for 2 photos"), ({"concepts": ["cat"]}, "cat"),
        ({"subject": ""}, "no subject"), ({"photo_guidance": float("nan")}, "guidance"), ({"steps": 0}, "steps"),
        ({"width": 100}, "multiples"), ({"seed": [1]}, "seeds"),
        ({"negative_prompt": "red", "guidance": 1.0}, "does nothing"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(pipe: ConsiStory, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConsistoryError, match=says):
        personalize(pipe, **options)


def test_a_prompt_without_the_concept_is_told_before_any_work(subject: Subject) -> None:
    def on_step(done: int, total: int) -> None:
        raise AssertionError

    with pytest.raises(ConsistoryError, match="dog"):
        subject.extend(prompts=["a dog in space", "a cat in space"], chunk=1, on_step=on_step)


# --- size -------------------------------------------------------------------------------------------------------------


def test_a_photo_of_the_right_size_stays(caplog: pytest.LogCaptureFixture) -> None:
    photo = picture(0, 48, 64)
    assert fit_photo(photo, 48, 64, "x") is photo
    assert not caplog.records


@pytest.mark.parametrize("height, width", [(40, 100), (100, 40), (16, 33)])
def test_a_photo_is_cut_to_its_centre(height: int, width: int, caplog: pytest.LogCaptureFixture) -> None:
    photo = picture(0, height, width)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    centre = Image.fromarray(photo[top : top + side, left : left + side])
    expected = np.asarray(centre.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(fit_photo(photo, 32, 32, "x.png") - expected).max() <= 2
    assert caplog.records[0].levelno == logging.WARNING
    assert f"x.png, {width}x{height} pixels" in caplog.text and f"{side}x{side}" in caplog.text


def test_resizing_alone_cuts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert fit_photo(picture(0, 200, 100), 64, 32, "x.png").shape == (64, 32, 3)
    assert "is resized to 32x64" in caplog.text and "cut" not in caplog.text
