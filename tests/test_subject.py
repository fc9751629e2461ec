from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from consistory import ConsiStory, ConsistoryConfig, ConsistoryError, FreeU, Story
from consistory.subject import Subject, fingerprint

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


def test_chosen_pictures_of_an_extension(anchors: Story, whole: Story) -> None:
    records, pictures = [], {}
    more = anchors.subject.extend(
        [*SETTINGS[2:], "by night"], chunk=1, choose=lambda record: records.append(record) or [2, 1],
        on_picture=pictures.__setitem__,
    )  # fmt: skip
    assert more.seeds == [6, 7] and list(pictures) == [1, 2]
    assert all(np.array_equal(pictures[1 + i], more.images[i]) for i in (0, 1))
    torch.testing.assert_close(more.latents[:1], whole.latents[3:], atol=1e-4, rtol=0)
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
     ({"prompts": ["a cat"]}, "dog"), ({"settings": ["in space"], "seed": [1, 2]}, "seeds")],
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
