from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import randn, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from consistory import ConsiStory, ConsistoryConfig, ConsistoryError, FreeU, Story
from consistory.ip_adapter import ImageTokens, IPAdapter
from consistory.story import Observer, Plan, State
from consistory.subject import Subject, fingerprint, identity
from consistory.unet import UNet

SETTINGS = ["on the beach", "in the snow", "in space", "at home"]
SIZE = {"width": 128, "height": 128, "steps": 4}


@pytest.fixture(scope="module")
def pipe(golden_weights: Path) -> ConsiStory:
    """In float64, where no rounding error carries a patch over a threshold."""
    return ConsiStory.from_pretrained(golden_weights, dtype=torch.float64)


@pytest.fixture(scope="module")
def whole(pipe: ConsiStory) -> Story:
    return pipe(subject="a cute dog", settings=SETTINGS, seed=3, **SIZE)


@pytest.fixture(scope="module")
def anchors(pipe: ConsiStory) -> Story:
    return pipe(subject="a cute dog", settings=SETTINGS[:2], seed=3, **SIZE)


def test_extending_is_like_one_large_story(anchors: Story, whole: Story) -> None:
    more = anchors.subject.extend(SETTINGS[2:])
    assert more.prompts == whole.prompts[2:] and more.seeds == whole.seeds[2:]
    torch.testing.assert_close(more.latents, whole.latents[2:], atol=1e-6, rtol=0)


def test_an_extension_may_be_observed(anchors: Story, whole: Story) -> None:
    """Its anchors, which are run along, come first."""

    class Last(Observer):
        latents: Tensor

        def step(self, plan: Plan, before: State, after: State, output: Tensor) -> None:
            self.latents = after.x

    anchors.subject.extend(SETTINGS[2:], observer=(last := Last()))
    torch.testing.assert_close(last.latents, whole.latents, atol=1e-6, rtol=0)


def test_chunks_do_not_matter(anchors: Story, whole: Story) -> None:
    ticks: list[tuple[int, int]] = []
    more = anchors.subject.extend(SETTINGS[2:], chunk=1, on_step=lambda done, total: ticks.append((done, total)))
    torch.testing.assert_close(more.latents, whole.latents[2:], atol=1e-6, rtol=0)
    assert len(more.images) == len(more.masks[2]) == len(more.nearest[2].index) == 2
    assert [done for done, _ in ticks] == list(range(1, ticks[-1][1] + 1))


@pytest.mark.parametrize("chunk, calls", [(1, [6, 6]), (2, [8])])
def test_a_story_in_chunks_is_the_same_story(
    pipe: ConsiStory, whole: Story, monkeypatch: pytest.MonkeyPatch, chunk: int, calls: list[int]
) -> None:
    """At most so many pictures beside the anchors, in both guidance halves, are in a call of the UNet."""
    ticks: list[tuple[int, int]] = []
    batches: list[int] = []
    encode = pipe.unet.encode
    monkeypatch.setattr(pipe.unet, "encode", lambda x, *others: batches.append(len(x)) or encode(x, *others))
    story = pipe(
        subject="a cute dog", settings=SETTINGS, seed=3, chunk=chunk, **SIZE,
        on_step=lambda done, total: ticks.append((done, total)),
    )  # fmt: skip
    torch.testing.assert_close(story.latents, whole.latents, atol=1e-6, rtol=0)
    assert np.abs(story.images.astype(int) - whole.images).max() <= 1
    assert (story.prompts, story.seeds, story.settings) == (whole.prompts, whole.seeds, whole.settings)
    assert all(torch.equal(story.masks[stride], mask) for stride, mask in whole.masks.items())
    assert all(story.nearest[s].index.shape == nearest.index.shape for s, nearest in whole.nearest.items())
    assert story.subject.recipe == whole.subject.recipe
    assert [size for i, size in enumerate(batches) if i % (len(batches) // len(calls)) == 0] == calls
    assert set(batches) == set(calls)
    assert ticks == [(done, ticks[-1][1]) for done in range(1, ticks[-1][1] + 1)]


def test_without_guidance_a_call_takes_half_the_samples(
    pipe: ConsiStory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 1 or less, with a picture that prompts, too, at once and in every way that a subject is kept."""
    adapter = IPAdapter(pipe.unet, ImageTokens(6, tokens=2, context_width=pipe.unet.config.context_width))
    randomise(adapter)
    prompted = pipe.with_picture(adapter, randn(2, 6))
    batches: list[int] = []
    encode = pipe.unet.encode
    monkeypatch.setattr(pipe.unet, "encode", lambda x, *others: batches.append(len(x)) or encode(x, *others))
    call = {"subject": "a cute dog", "seed": 3, **SIZE}
    whole = prompted(**call, settings=SETTINGS, guidance=1)
    assert set(batches) == {4}
    assert torch.equal(prompted(**call, settings=SETTINGS, guidance=0).latents, whole.latents)
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(prompted(**call, settings=SETTINGS, guidance=1 + 1e-9).latents, whole.latents, **close)
    for record in (None, tmp_path / "recording.safetensors"):
        subject = prompted(**call, settings=SETTINGS[:2], guidance=1, record=record).subject
        torch.testing.assert_close(subject.extend(SETTINGS[2:]).latents, whole.latents[2:], **close)


def test_plain_pictures_in_chunks(pipe: ConsiStory) -> None:
    plain = {"subject": "a cute dog", "settings": SETTINGS[:3], "config": ConsistoryConfig.vanilla(), "anchors": 1}
    story, whole = pipe(**plain, chunk=1, **SIZE), pipe(**plain, **SIZE)
    torch.testing.assert_close(story.latents, whole.latents, atol=1e-6, rtol=0)


def test_seeds_go_on_after_those_of_every_chunk(pipe: ConsiStory) -> None:
    quick = {"subject": "a dog", "settings": SETTINGS, "seed": [5, 1, 90, 2], "steps": 1, "width": 64, "height": 64}
    assert pipe(**quick, chunk=1).subject.recipe.next_seed == 91


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"chunk": 0}, "use 1 or more"),
     ({"chunk": 1, "settings": None, "prompts": ["a dog"] * 3 + ["a cat"]}, "'a cat'")],
)  # fmt: skip
def test_chunks_that_cannot_be_are_refused_before_any_work(
    pipe: ConsiStory, monkeypatch: pytest.MonkeyPatch, arguments: dict, says: str
) -> None:
    monkeypatch.setattr(type(pipe), "encode_prompts", None)
    with pytest.raises(ConsistoryError, match=says):
        pipe(**{"subject": "a dog", "settings": SETTINGS, **SIZE, **arguments})


def test_chosen_pictures_of_an_extension(anchors: Story, whole: Story) -> None:
    records, pictures = [], {}
    more = anchors.subject.extend(
        [*SETTINGS[2:], "by night"], chunk=1, choose=lambda record: records.append(record) or [2, 1],
        on_picture=pictures.__setitem__,
    )  # fmt: skip
    assert more.seeds == [6, 7] and list(pictures) == [1, 2]
    assert all(np.array_equal(pictures[1 + i], more.images[i]) for i in (0, 1))
    torch.testing.assert_close(more.latents[:1], whole.latents[3:], atol=1e-6, rtol=0)
    (record,) = records
    assert record["prompts"] == [*whole.prompts[2:], "a cute dog by night"] and record["seeds"] == [5, 6, 7]
    assert (record["anchor_prompts"], record["anchor_seeds"]) == (whole.prompts[:2], [3, 4])
    assert more.subject.recipe == replace(anchors.subject.recipe, next_seed=8)


def test_a_wrong_prompt_stops_all_chunks_before_they_start(anchors: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consistory.model.tell", None)
    with pytest.raises(ConsistoryError, match="'a cat'"):
        anchors.subject.extend(prompts=["a dog", "a cat"], chunk=1)


def test_a_saved_subject_goes_on(anchors: Story, whole: Story, pipe: ConsiStory, tmp_path: Path) -> None:
    anchors.subject.save(tmp_path / "dog.safetensors")
    loaded = Subject.load(tmp_path / "dog.safetensors", pipe)
    assert loaded.recipe == anchors.subject.recipe
    assert all(torch.equal(loaded.masks[stride], mask) for stride, mask in anchors.subject.masks.items())
    torch.testing.assert_close(loaded.extend(SETTINGS[2:]).latents, whole.latents[2:], atol=1e-6, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["dog.safetensors"]


def test_seeds_go_on_after_those_used(anchors: Story) -> None:
    once = anchors.subject.extend(["in space"])
    again = once.subject.extend(["in space"])
    assert (once.seeds, again.seeds) == ([5], [6])
    assert not torch.equal(once.latents, again.latents)


def test_a_file_of_another_model_is_refused(anchors: Story, pipe: ConsiStory, tmp_path: Path) -> None:
    path = tmp_path / "dog.safetensors"
    anchors.subject.save(path)
    other = ConsiStory.from_pretrained(pipe.name)
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(-1)
    with pytest.raises(ConsistoryError, match="another model"):
        Subject.load(path, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fingerprint_does_not_depend_on_precision(pipe: ConsiStory, dtype: torch.dtype) -> None:
    other = ConsiStory.from_pretrained(pipe.name, dtype=dtype)
    assert fingerprint(other.unet) == fingerprint(pipe.unet)


@pytest.fixture
def faint(pipe: ConsiStory, tmp_path: Path) -> Path:
    """A LoRA of every self-attention of the UNet that turns no sign among the values that a fingerprint sees."""
    tensors = {}
    for name, parameter in pipe.unet.named_parameters():
        if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
            stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            up = torch.zeros(len(parameter), 1)
            up[-1] = 0.01
            tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": torch.ones(1, parameter.shape[1])}
    save_file(tensors, tmp_path / "faint.safetensors")
    return tmp_path / "faint.safetensors"


def test_a_lora_makes_another_model(anchors: Story, pipe: ConsiStory, faint: Path, tmp_path: Path) -> None:
    """Even if no sign turns; with another weight, again another; the same one from a copy of the file."""
    merged, half = (ConsiStory.from_pretrained(pipe.name, loras=[(faint, weight)]) for weight in (1, 0.5))
    assert fingerprint(merged.unet) == fingerprint(pipe.unet)
    assert len({identity(merged), identity(half), identity(pipe)}) == 3
    copy = shutil.copy(faint, tmp_path / "copy.safetensors")
    assert identity(ConsiStory.from_pretrained(pipe.name, loras=[(copy, 1.0)])) == identity(merged)
    path = tmp_path / "dog.safetensors"
    anchors.subject.save(path)
    with pytest.raises(ConsistoryError, match="other LoRAs"):
        Subject.load(path, merged)
    Subject(merged, anchors.subject.recipe, anchors.subject.masks).save(path)
    assert Subject.load(path, merged).recipe == anchors.subject.recipe
    with pytest.raises(ConsistoryError, match="other LoRAs"):
        Subject.load(path, pipe)


def test_loras_make_the_same_model_in_any_order(pipe: ConsiStory, faint: Path) -> None:
    loras = [(faint, 1.0), (faint, 0.25)]
    first, second = (ConsiStory.from_pretrained(pipe.name, loras=order) for order in (loras, loras[::-1]))
    assert identity(first) == identity(second)


def test_a_model_with_a_lora_is_the_same_in_any_precision(pipe: ConsiStory, tmp_path: Path) -> None:
    """Also from weights that were rounded before: where a LoRA cancels a weight, rounding decides on the sign."""
    name = "mid_block.attentions.0.proj_in"
    parameter = pipe.unet.get_parameter(f"{name}.weight")
    halves = {f"unet.{name}.lora_B.weight": -parameter, f"unet.{name}.lora_A.weight": torch.eye(len(parameter))}
    save_file(halves, tmp_path / "x.safetensors")
    folder = shutil.copytree(pipe.name, tmp_path / "rounded")
    (weights,) = (folder / "unet").glob("*.safetensors")
    save_file({key: x.half() for key, x in load_file(weights).items()}, weights)
    models = [
        ConsiStory.from_pretrained(source, dtype=dtype, loras=[(tmp_path / "x.safetensors", 1.0)])
        for source, dtype in ((pipe.name, torch.float32), (folder, torch.float16), (folder, torch.bfloat16))
    ]
    assert len({fingerprint(model.unet) for model in models}) > 1
    assert len({identity(model) for model in models}) == 1


def test_skipped_layers_are_kept(pipe: ConsiStory, tmp_path: Path) -> None:
    story = pipe(subject="a cute dog", settings=SETTINGS[:3], seed=3, clip_skip=1, **SIZE)
    anchors = pipe(subject="a cute dog", settings=SETTINGS[:2], seed=3, clip_skip=1, **SIZE)
    anchors.subject.save(tmp_path / "dog.safetensors")
    more = Subject.load(tmp_path / "dog.safetensors", pipe).extend(SETTINGS[2:3])
    torch.testing.assert_close(more.latents, story.latents[2:], atol=1e-6, rtol=0)
    assert more.settings["clip_skip"] == 1


# --- recorded ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(pipe: ConsiStory, tmp_path_factory: pytest.TempPathFactory) -> Story:
    path = tmp_path_factory.mktemp("recorded") / "dog.safetensors"
    return pipe(subject="a cute dog", settings=SETTINGS[:2], seed=3, record=path, **SIZE)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples in every call of the UNet, two a picture."""
    sizes: list[int] = []
    encode = UNet.encode

    def counted(unet: UNet, x: Tensor, *others: Any) -> Any:
        sizes.append(len(x))
        return encode(unet, x, *others)

    monkeypatch.setattr(UNet, "encode", counted)
    return sizes


def test_recording_does_not_change_a_story(recorded: Story, anchors: Story) -> None:
    assert torch.equal(recorded.latents, anchors.latents)
    assert recorded.subject.recipe == anchors.subject.recipe
    assert all(torch.equal(recorded.subject.masks[s], mask) for s, mask in anchors.subject.masks.items())
    assert recorded.subject.recorded and not anchors.subject.recorded


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_recorded_subject_is_extended_without_its_anchors(
    recorded: Story, whole: Story, pipe: ConsiStory, batches: list[int], chunk: int | None
) -> None:
    """The same file, in the process that recorded it and in another."""
    assert recorded.subject.recorded
    loaded = Subject.load(recorded.subject.recorded.path, pipe)
    assert loaded.recipe == recorded.subject.recipe
    for subject in (recorded.subject, loaded):
        batches.clear()
        more = subject.extend(SETTINGS[2:], chunk=chunk)
        torch.testing.assert_close(more.latents, whole.latents[2:], atol=1e-6, rtol=0)
        assert set(batches) == {2 * (chunk or 2)}
        assert more.prompts == whole.prompts[2:] and more.seeds == whole.seeds[2:]
        assert more.settings == whole.settings
        assert more.subject.recipe == replace(subject.recipe, next_seed=7) and more.subject.recorded
        for stride, mask in whole.masks.items():
            assert torch.equal(more.masks[stride], mask[2:])
            assert torch.equal(more.nearest[stride].index, whole.nearest[stride].index[2:])


def test_two_and_four_are_six(tmp_path: Path) -> None:
    """With trained weights, whose patches lie close to their thresholds."""
    pipe = ConsiStory.from_pretrained("sprites", dtype=torch.float64)
    settings = ["on the beach", "in the snow", "in the forest", "in space", "under the sea", "in a meadow"]
    small: dict[str, Any] = {"subject": "a cat", "seed": 7, "steps": 6, "width": 32, "height": 32}
    whole = pipe(settings=settings, **small)
    subject = pipe(settings=settings[:2], record=tmp_path / "cat", **small).subject
    for grade in (subject, replace(subject, recorded=None)):
        for chunk in (4, 1):
            more = grade.extend(settings[2:], chunk=chunk)
            torch.testing.assert_close(more.latents, whole.latents[2:], atol=1e-6, rtol=0)


def test_separate_subjects_are_not_recorded(pipe: ConsiStory, tmp_path: Path) -> None:
    config = ConsistoryConfig(separate_subjects=True)
    with pytest.raises(ConsistoryError, match="recipe instead"):
        pipe(subject="a dog and a cat", settings=SETTINGS[:2], concepts=["dog", "cat"], config=config,
             record=tmp_path / "both.safetensors", **SIZE)  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_recorded_is_refused_before_pictures_are_chosen(pipe: ConsiStory, tmp_path: Path) -> None:
    """So that all ranks of a distributed run hear of it."""

    def choose(record: dict[str, Any]) -> list[int]:
        raise AssertionError

    with pytest.raises(ConsistoryError, match="recipe instead"):
        pipe(prompts=["a dog and a cat"], concepts=["dog", "cat"], config=ConsistoryConfig(separate_subjects=True),
             record=tmp_path / "both.safetensors", choose=choose, **SIZE)  # fmt: skip


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda story: pickle.loads(pickle.dumps(story))], ids=["copy", "pickle"]
)
def test_copies_of_a_recorded_story(
    copied: Callable[[Story], Story], golden_weights: Path, tmp_path: Path
) -> None:
    """Of a model with a LoRA."""
    factors = {"A": torch.ones(1, 4, 3, 3), "B": torch.ones(16, 1, 1, 1)}
    save_file({f"unet.conv_in.lora_{x}.weight": y for x, y in factors.items()}, tmp_path / "lora.safetensors")
    pipe = ConsiStory.from_pretrained(golden_weights, loras=[tmp_path / "lora.safetensors"])
    small = {"width": 64, "height": 64, "steps": 2}
    story = pipe(subject="a cute dog", settings=SETTINGS[:2], record=tmp_path / "dog.safetensors", **small)
    again = copied(story)
    more, expected = (one.subject.extend(SETTINGS[2:3]) for one in (again, story))
    assert torch.equal(more.latents, expected.latents)
    assert again != story and {story: 1}[story] == 1, "tensors cannot be compared as other values are"


def test_what_a_notebook_shows_is_short(anchors: Story) -> None:
    for shown in (repr(anchors), repr(anchors.subject), repr(anchors.subject.pipe)):
        assert len(shown) < 3000
    assert "dog" in repr(anchors) and "golden" in repr(anchors.subject.pipe)


@pytest.mark.parametrize("grade", ["save", "record"])
def test_another_spacing_is_refused(golden_weights: Path, grade: str, tmp_path: Path) -> None:
    trailing = ConsiStory.from_pretrained(golden_weights, spacing="trailing")
    story = trailing(subject="a cute dog", settings=SETTINGS[:1], width=64, height=64, steps=1)
    getattr(story.subject, grade)(tmp_path / "dog.safetensors")
    assert Subject.load(tmp_path / "dog.safetensors", trailing).recipe == story.subject.recipe
    with pytest.raises(ConsistoryError, match="load the model with the spacing and the prediction it was made with"):
        Subject.load(tmp_path / "dog.safetensors", ConsiStory.from_pretrained(golden_weights, spacing="leading"))


def test_a_recipe_becomes_a_recording(anchors: Story, whole: Story, pipe: ConsiStory, tmp_path: Path) -> None:
    path = tmp_path / "dog.safetensors"
    anchors.subject.save(path)
    subject = Subject.load(path, pipe).record(path)
    assert subject.recipe == anchors.subject.recipe == Subject.load(path, pipe).recipe
    torch.testing.assert_close(subject.extend(SETTINGS[2:]).latents, whole.latents[2:], atol=1e-6, rtol=0)
    assert list(tmp_path.iterdir()) == [path]


def test_anchors_of_given_noise(pipe: ConsiStory, tmp_path: Path) -> None:
    """No seed makes them: a recipe keeps the noise along."""
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    prompts = [f"a cute dog {setting}" for setting in SETTINGS[:3]]
    given = {"concepts": ["dog"], "seed": 3, **SIZE}
    whole = pipe(prompts=prompts, latents=noise, **given)
    story = pipe(prompts=prompts[:2], latents=noise[:2], record=tmp_path / "recording", **given)
    replace(story.subject, recorded=None).save(tmp_path / "recipe")
    for grade in ("recording", "recipe"):
        subject = Subject.load(tmp_path / grade, pipe)
        more = subject.extend(prompts=prompts[2:], latents=noise[2:])
        torch.testing.assert_close(more.latents, whole.latents[2:], atol=1e-6, rtol=0)
        assert bool(subject.recorded) == (grade == "recording")


def test_the_precision_of_given_noise_is_not_the_anchors(anchors: Story) -> None:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, expected = (anchors.subject.extend(["in space"], latents=x) for x in (noise, noise.float()))
    assert torch.equal(found.latents, expected.latents)
    assert all(torch.equal(mask, expected.subject.masks[s]) for s, mask in found.subject.masks.items())


def test_a_subject_of_whole_prompts_needs_them(pipe: ConsiStory) -> None:
    story = pipe(prompts=["a dog at sea"], concepts=["dog"], **SIZE)
    with pytest.raises(ConsistoryError, match="extend it with prompts="):
        story.subject.extend(["in space"])


def test_pictures_to_choose_are_those_of_the_extension(anchors: Story) -> None:
    with pytest.raises(ConsistoryError, match=r"pictures \[2\] are chosen of 2"):
        anchors.subject.extend(SETTINGS[2:], choose=lambda record: [2])


def test_a_recording_is_made_even_if_no_picture_is_missing(pipe: ConsiStory, anchors: Story, tmp_path: Path) -> None:
    path = tmp_path / "dog"
    story = pipe(
        subject="a cute dog", settings=SETTINGS[:2], seed=3, **SIZE, record=path, choose=lambda record: []
    )  # fmt: skip
    assert len(story.images) == 0 and story.subject.recorded
    found, expected = (subject.extend(["in space"]).latents for subject in (Subject.load(path, pipe), anchors.subject))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_recipe_does_not_replace_its_recording(recorded: Story, pipe: ConsiStory, tmp_path: Path) -> None:
    assert recorded.subject.recorded
    path = recorded.subject.recorded.path
    with pytest.raises(ConsistoryError, match="choose another name"):
        recorded.subject.save(path)
    recorded.subject.save(tmp_path / "recipe")
    assert Subject.load(path, pipe).recorded
    assert not Subject.load(tmp_path / "recipe", pipe).recorded


def test_a_recording_in_half_precision(golden_weights: Path, tmp_path: Path) -> None:
    """Kept as the model has it; a model of another precision can go on from it."""
    story = ConsiStory.from_pretrained(golden_weights, dtype=torch.bfloat16)(
        subject="a cute dog", settings=SETTINGS[:2], seed=3, record=tmp_path / "dog", **(SIZE | {"steps": 2})
    )
    with safe_open(tmp_path / "dog", "pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.bfloat16, torch.bool}
    for subject in (story.subject, Subject.load(tmp_path / "dog", ConsiStory.from_pretrained(golden_weights))):
        assert subject.extend(SETTINGS[2:3]).latents.isfinite().all()


@pytest.mark.parametrize("end", ["interrupted", "not finite"])
def test_a_recording_that_fails_leaves_nothing(golden_weights: Path, tmp_path: Path, end: str) -> None:
    pipe = ConsiStory.from_pretrained(golden_weights)

    def interrupt(done: int, total: int) -> None:
        if end == "interrupted" and done == total - 1:
            raise KeyboardInterrupt

    if end == "not finite":
        with torch.no_grad():
            pipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(KeyboardInterrupt if end == "interrupted" else ConsistoryError):
        pipe(subject="a dog", settings=SETTINGS[:2], record=tmp_path / "dog", on_step=interrupt, **SIZE)
    assert not list(tmp_path.iterdir())


def test_a_recording_that_cannot_be_written_stops_before_any_work(pipe: ConsiStory, tmp_path: Path) -> None:
    ticks: list[int] = []
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "dog"):
        with pytest.raises(ConsistoryError, match="cannot be written"):
            pipe(
                subject="a dog", settings=SETTINGS[:2], record=path, on_step=lambda done, total: ticks.append(done),
                **SIZE,
            )  # fmt: skip
    with pytest.raises(ConsistoryError, match="dog"):
        pipe(prompts=["a cat"], concepts=["dog"], record=tmp_path / "dog", **SIZE)
    assert not ticks and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("grade", ["recording", "recipe"])
def test_a_damaged_file_is_refused(
    recorded: Story, anchors: Story, pipe: ConsiStory, tmp_path: Path, grade: str
) -> None:
    path = tmp_path / "dog"
    anchors.subject.save(path)
    if grade == "recording":
        assert recorded.subject.recorded
        path.write_bytes(recorded.subject.recorded.path.read_bytes())
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-1])
    with pytest.raises(ConsistoryError, match="not a complete subject file"):
        Subject.load(path, pipe)
    whole[-100] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ConsistoryError, match="is damaged: save the subject again"):
        Subject.load(path, pipe)


def test_a_file_of_another_version_is_refused(pipe: ConsiStory, tmp_path: Path) -> None:
    save_file({"masks.2": torch.zeros(1)}, tmp_path / "dog", {"format": "consistory subject 1"})
    with pytest.raises(ConsistoryError, match="not a subject file of this version"):
        Subject.load(tmp_path / "dog", pipe)


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_files_that_are_no_subject(pipe: ConsiStory, tmp_path: Path) -> None:
    with pytest.raises(ConsistoryError, match="no file"):
        Subject.load(tmp_path / "nothing.safetensors", pipe)
    (tmp_path / "text.safetensors").write_text("not a tensor in sight")
    with pytest.raises(ConsistoryError, match="not a complete subject file"):
        Subject.load(tmp_path / "text.safetensors", pipe)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError, match="not a subject file"):
        Subject.load(tmp_path / "x.safetensors", pipe)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"settings": []}, "setting"), ({"settings": ["in space"], "chunk": 0}, "chunk"),
     ({"prompts": ["a cat"]}, "dog"), ({"prompts": "a dog"}, "single string"),
     ({"settings": ["in space"], "seed": [1, 2]}, "seeds"),
     ({"settings": ["in space"], "latents": torch.zeros(2, 4, 16, 16)}, "latents are")],
)  # fmt: skip
def test_arguments_that_do_not_fit(anchors: Story, arguments: dict, says: str) -> None:
    with pytest.raises(ConsistoryError, match=says):
        anchors.subject.extend(**arguments)


@pytest.mark.parametrize(
    "config",
    [ConsistoryConfig(), ConsistoryConfig.vanilla(), replace(ConsistoryConfig.reference(), freeu=FreeU(), dropout=0.1)],
)
def test_a_config_survives_json(config: ConsistoryConfig) -> None:
    assert ConsistoryConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
