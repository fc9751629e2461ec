"""The sprites world and its tokenizer."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from consistory.tokenizer import Tokenizer
from consistory.weights.sprites.tokenizer import END, EXTRA_WORDS, build_tokenizer, byte_symbols, caption_words
from consistory.weights.sprites.world import (
    COLOUR_NAMES,
    COLOURS,
    INK,
    PATTERNS,
    SETTINGS,
    SUBJECTS,
    Scenes,
    captions,
    render,
    sample_scenes,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_look() -> Scenes:
    """Each subject with each pattern, alone, red and blue, in the middle of the picture."""
    count = len(SUBJECTS) * len(PATTERNS)
    scenes = sample_scenes(count, seeded(0), second_subject=0)
    index = torch.arange(count)
    return replace(
        scenes,
        subject=index // len(PATTERNS),
        pattern=index % len(PATTERNS),
        main=torch.full((count,), COLOUR_NAMES.index("red")),
        second=torch.full((count,), COLOUR_NAMES.index("blue")),
        x=torch.full((count,), 32.0),
        y=torch.full((count,), 34.0),
    )


def near(images: torch.Tensor, colour: str) -> torch.Tensor:
    """Which pixels show the colour, [B, R, R]."""
    return (images - torch.tensor(COLOURS[colour])[:, None, None]).abs().amax(1) < 0.02


def test_scenes_pictures_and_captions_are_determined_by_the_seed() -> None:
    first, again, other = (sample_scenes(20, seeded(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(getattr(first, field.name), getattr(again, field.name)) for field in fields(Scenes))
    assert torch.equal(render(first)[0], render(again)[0])
    assert captions(first, seeded(5)) == captions(again, seeded(5))
    assert captions(first, seeded(5)) != captions(first, seeded(6))
    assert not torch.equal(render(first)[0], render(other)[0])


@pytest.mark.parametrize("resolution", [32, 64, 96])
def test_pictures_and_masks_have_their_shapes_and_ranges(resolution: int) -> None:
    images, masks = render(sample_scenes(24, seeded(0)), resolution)
    assert images.shape == (24, 3, resolution, resolution) and images.dtype == torch.float32
    assert masks.shape == (24, resolution, resolution) and masks.dtype == torch.bool
    assert images.min() >= 0 and images.max() <= 1
    assert masks.flatten(1).any(1).all()


def test_a_scene_is_drawn_the_same_alone_and_in_a_batch() -> None:
    scenes = sample_scenes(600, seeded(1))
    images, masks = render(scenes)
    for index in (0, 511, 512, 599):
        image, mask = render(scenes[[index]])
        torch.testing.assert_close(image[0], images[index], atol=1e-6, rtol=0)
        assert torch.equal(mask[0], masks[index])


def test_only_the_masked_pixels_show_the_subject() -> None:
    scenes = sample_scenes(200, seeded(2))
    images, masks = render(scenes)
    recoloured, _ = render(replace(scenes, main=(scenes.main + 1) % len(COLOURS)))
    changed = (images != recoloured).any(1)
    assert not (changed & ~masks).any()
    assert changed.flatten(1).any(1).all()

    moved, _ = render(replace(scenes, x=scenes.x - 1000))
    difference = (images - moved).abs()
    half_outline = 0.5 * (torch.tensor(INK)[:, None, None] - moved).abs()
    assert ((difference <= half_outline + 1e-5) | masks[:, None]).all()  # the rim of the outline is blended
    assert ((difference.amax(1) > 0.1) & masks).sum() > 0.9 * masks.sum()


def test_both_colours_show_on_every_subject_and_the_main_one_most_when_plain() -> None:
    scenes = every_look()
    images, _ = render(scenes)
    red, blue = (near(images, colour).sum((1, 2)) for colour in ("red", "blue"))
    assert (red > 60).all() and (blue > 20).all()
    plain = scenes.pattern == PATTERNS.index("plain")
    assert (red[plain] > 1.5 * blue[plain]).all()


def test_patterns_differ_on_every_subject() -> None:
    images = render(every_look())[0].unflatten(0, (len(SUBJECTS), len(PATTERNS)))
    for a in range(len(PATTERNS)):
        for b in range(a):
            different = (images[:, a] - images[:, b]).abs().amax(1).flatten(1).amax(1)
            assert (different > 0.5).all()


def test_facing_mirrors_the_subject() -> None:
    scenes = every_look()
    right, left = (replace(scenes, facing=torch.full((len(scenes),), side)) for side in (1.0, -1.0))
    assert torch.equal(render(left)[1].flip(2), render(right)[1])
    assert (render(left)[0] != render(right)[0]).any(1).flatten(1).any(1).all()


def test_subjects_are_large_and_mostly_inside() -> None:
    scenes = sample_scenes(300, seeded(7), second_subject=0)
    centred = replace(scenes, x=torch.full((300,), 32.0), y=torch.full((300,), 32.0))
    whole, shown = (render(s)[1].sum((1, 2)).float() for s in (centred, scenes))
    assert (whole / 64**2).min() > 0.08 and (whole / 64**2).max() < 0.4
    assert (shown / whole).min() > 0.75


def test_a_second_subject_is_drawn_beside_the_first() -> None:
    scenes = sample_scenes(200, seeded(8), second_subject=1.0)
    assert (scenes.subject2 >= 0).all() and (scenes.subject2 != scenes.subject).all()
    _, masks = render(scenes)
    swapped = replace(scenes, **{name: getattr(scenes, f"{name}2") for name in ("subject", "x", "y", "size", "facing")})
    _, masks2 = render(swapped)
    assert ((masks & masks2).sum((1, 2)) < 0.1 * masks.sum((1, 2))).all()
    alone, _ = render(replace(scenes, subject2=torch.full((200,), -1)))
    changed = (render(scenes)[0] != alone).any(1)
    assert (changed.sum((1, 2)) > 60).all() and ((changed & masks).sum((1, 2)) < 0.1 * masks.sum((1, 2))).all()


def test_the_resolution_changes_only_the_sampling() -> None:
    scenes = sample_scenes(64, seeded(9))
    coarse, coarse_masks = render(scenes, 64)
    fine, fine_masks = render(scenes, 256)
    averaged = torch.nn.functional.avg_pool2d(fine, 4)
    assert (averaged - coarse).abs().mean() < 0.01
    majority = torch.nn.functional.avg_pool2d(fine_masks.float(), 4) > 0.5
    assert (majority != coarse_masks).float().mean() < 0.005


def test_properties_cover_their_range_independently() -> None:
    scenes = sample_scenes(8000, seeded(10))
    assert not (scenes.main == scenes.second).any() and not (scenes.main2 == scenes.second2).any()
    assert 0.08 < (scenes.subject2 >= 0).float().mean() < 0.12
    ranges = {"subject": SUBJECTS, "setting": SETTINGS, "main": COLOURS, "second": COLOURS, "pattern": PATTERNS}
    for name, values in ranges.items():
        share = torch.bincount(getattr(scenes, name), minlength=len(values)) / 8000
        assert (share * len(values) - 1).abs().max() < 0.15, name
    joint = torch.bincount(scenes.subject * len(SETTINGS) + scenes.setting, minlength=64) / 8000
    assert (joint * 64 - 1).abs().max() < 0.4
    facts = ("subject", "setting", "main", "pattern", "x", "y", "size", "facing")
    alone = scenes[scenes.subject2 < 0]
    correlation = torch.corrcoef(torch.stack([getattr(alone, name).float() for name in facts]))
    assert (correlation - torch.eye(len(facts))).abs().max() < 0.05


def test_captions_name_the_subject_the_setting_and_only_drawn_colours() -> None:
    scenes = sample_scenes(2000, seeded(11))
    texts = captions(scenes, seeded(12))
    named = 0
    for index, text in enumerate(texts):
        words = text.replace(",", "").split()
        assert text == text.lower() and text.endswith(SETTINGS[scenes.setting[index]])
        mentioned = [word for word in words if word in SUBJECTS]
        drawn = [(scenes.subject[index], scenes.main[index]), (scenes.subject2[index], scenes.main2[index])]
        drawn = [(SUBJECTS[subject], COLOUR_NAMES[main]) for subject, main in drawn if subject >= 0]
        assert mentioned == [subject for subject, _ in drawn]
        for place, word in enumerate(words):
            if word in COLOURS:
                assert (words[place + 1], word) in drawn
                named += 1
            if word in ("a", "an"):
                assert (word == "an") == (words[place + 1][0] in "aeiou")
    assert 0.2 < named / (2000 + (scenes.subject2 >= 0).sum()) < 0.3
    assert {"a cat in space", "the cat in space", "cat, in space"} <= set(captions(scenes_of_cats(), seeded(0)))


def scenes_of_cats() -> Scenes:
    scenes = sample_scenes(100, seeded(0), second_subject=0)
    zeros = torch.zeros(100, dtype=torch.int64)
    return replace(scenes, subject=zeros, setting=zeros + SETTINGS.index("in space"))


@pytest.fixture(scope="module", params=[END, "!"])
def tokenizer_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, pad=request.param)
    return folder


def test_the_tokenizer_loads_in_transformers_and_gives_the_same_ids(tokenizer_folder: Path) -> None:
    oracle = CLIPTokenizer.from_pretrained(str(tokenizer_folder))
    ours = Tokenizer.from_folder(tokenizer_folder)
    prompts = captions(sample_scenes(50, seeded(0)), seeded(1))
    prompts += ["", "A cat's café, 3 zebras & more!", "UPPER case", "sunglasses"]
    expected = oracle(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours.encode(prompts), expected)


def test_every_word_is_one_token_and_ends_come_last(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    words = sorted(caption_words() | set(EXTRA_WORDS.split()))
    ids = tokenizer.encode(words)
    assert (ids[:, 2] == tokenizer.end).all() and len(set(ids[:, 1].tolist())) == len(words)
    assert tokenizer.start == tokenizer.end - 1 and ids.max() == tokenizer.end
    texts = captions(sample_scenes(3000, seeded(0)), seeded(1))
    assert {word for text in texts for word in text.replace(",", "").split()} == caption_words()


def test_padding_is_what_was_asked_for(tokenizer_folder: Path) -> None:
    oracle = CLIPTokenizer.from_pretrained(str(tokenizer_folder))
    ids = Tokenizer.from_folder(tokenizer_folder).encode(["a cat"])[0]
    assert (ids[4:] == oracle.pad_token_id).all()
    assert oracle.pad_token_id == (0 if oracle.pad_token == "!" else ids.max())


def test_the_byte_symbols_are_those_of_byte_level_encoding() -> None:
    assert sorted(byte_symbols()) == sorted(ByteLevel.alphabet())
    assert byte_symbols()[:4] == list('!"#$') and len(set(byte_symbols())) == 256


def test_the_tokenizer_is_the_same_each_time(tokenizer_folder: Path, tmp_path: Path) -> None:
    pad = CLIPTokenizer.from_pretrained(str(tokenizer_folder)).pad_token
    build_tokenizer(tmp_path, pad=pad)
    for file in sorted(tokenizer_folder.iterdir()):
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()
