from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from consistory import ConsiStory, ConsistoryConfig, ConsistoryError, FreeU, Story
from consistory.subject import Subject, fingerprint
from consistory.unet import UNet

SETTINGS = ["on the beach", "in the snow", "in space", "at home"]
SIZE = {"width": 128, "height": 128, "steps": 4}


@pytest.fixture(scope="module")
def pipe(golden_weights: Path) -> ConsiStory:
    return ConsiStory.from_pretrained(golden_weights)


@pytest.fixture(scope="module")
def whole(pipe: ConsiStory) -> Story:
    return pipe(subject="a cute dog", settings=SETTINGS, seed=3, **SIZE)


@pytest.fixture(scope="module")
def anchors(pipe: ConsiStory) -> Story:
    return pipe(subject="a cute dog", settings=SETTINGS[:2], seed=3, **SIZE)


def test_extending_is_like_one_large_story(anchors: Story, whole: Story) -> None:
    more = anchors.subject.extend(SETTINGS[2:])
    assert more.prompts == whole.prompts[2:] and more.seeds == whole.seeds[2:]
    torch.testing.assert_close(more.latents, whole.latents[2:], atol=1e-4, rtol=0)


def test_chunks_do_not_matter(anchors: Story, whole: Story) -> None:
    ticks: list[tuple[int, int]] = []
    more = anchors.subject.extend(SETTINGS[2:], chunk=1, on_step=lambda done, total: ticks.append((done, total)))
    torch.testing.assert_close(more.latents, whole.latents[2:], atol=1e-4, rtol=0)
    assert len(more.images) == len(more.masks[2]) == len(more.nearest[2].index) == 2
    assert [done for done, _ in ticks] == list(range(1, ticks[-1][1] + 1))


def test_a_saved_subject_goes_on(anchors: Story, whole: Story, pipe: ConsiStory, tmp_path: Path) -> None:
    anchors.subject.save(tmp_path / "dog.safetensors")
    loaded = Subject.load(tmp_path / "dog.safetensors", pipe)
    assert loaded.recipe == anchors.subject.recipe
    assert all(torch.equal(loaded.masks[stride], mask) for stride, mask in anchors.subject.masks.items())
    torch.testing.assert_close(loaded.extend(SETTINGS[2:]).latents, whole.latents[2:], atol=1e-4, rtol=0)
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
        torch.testing.assert_close(more.latents, whole.latents[2:], atol=1e-4, rtol=0)
        assert set(batches) == {2 * (chunk or 2)}
        assert more.prompts == whole.prompts[2:] and more.seeds == whole.seeds[2:]
        assert more.settings == whole.settings
        assert more.subject.recipe == replace(subject.recipe, next_seed=7) and more.subject.recorded
        for stride, mask in whole.masks.items():
            assert torch.equal(more.masks[stride], mask[2:])
            assert torch.equal(more.nearest[stride].index, whole.nearest[stride].index[2:])


def test_a_recipe_becomes_a_recording(anchors: Story, whole: Story, pipe: ConsiStory, tmp_path: Path) -> None:
    path = tmp_path / "dog.safetensors"
    anchors.subject.save(path)
    subject = Subject.load(path, pipe).record(path)
    assert subject.recipe == anchors.subject.recipe == Subject.load(path, pipe).recipe
    torch.testing.assert_close(subject.extend(SETTINGS[2:]).latents, whole.latents[2:], atol=1e-4, rtol=0)
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
        torch.testing.assert_close(more.latents, whole.latents[2:], atol=1e-4, rtol=0)
        assert bool(subject.recorded) == (grade == "recording")


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
    for path in (tmp_path, tmp_path / "missing" / "dog"):
        with pytest.raises(ConsistoryError, match="cannot be written"):
            pipe(
                subject="a dog", settings=SETTINGS[:2], record=path, on_step=lambda done, total: ticks.append(done),
                **SIZE,
            )  # fmt: skip
    with pytest.raises(ConsistoryError, match="dog"):
        pipe(prompts=["a cat"], concepts=["dog"], record=tmp_path / "dog", **SIZE)
    assert not ticks and not list(tmp_path.iterdir())


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
    with pytest.raises(ConsistoryError, match="not a whole subject file"):
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
    with pytest.raises(ConsistoryError, match="not a whole subject file"):
        Subject.load(tmp_path / "text.safetensors", pipe)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError, match="not a subject file"):
        Subject.load(tmp_path / "x.safetensors", pipe)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"settings": []}, "setting"), ({"settings": ["in space"], "chunk": 0}, "chunk"),
     ({"prompts": ["a cat"]}, "dog"), ({"settings": ["in space"], "seed": [1, 2]}, "seeds"),
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
