"""Evaluations from a file of sets to scores, on the recorded model and a CLIP with random weights."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_clip import CONFIGS, save

from consistory import ConsiStory, ConsistoryConfig, ConsistoryError
from consistory.cli import main
from consistory.clip import CLIP
from consistory.evaluate import PromptSet, enlarge, evaluate, read_sets, remove_background, summarise

Capture = pytest.CaptureFixture[str]
YAML = """\
- style: a photo of
  subject: a cute dog
  concept_token: [dog]
  settings: [on the beach, in the snow, by night]
- subject: a fluffy cat
  settings: [on the beach]
"""
SETS = [
    {"style": "a photo of", "subject": "a cute dog", "concept_token": ["dog"],
     "settings": ["on the beach", "in the snow", "by night"]},
    {"subject": "a fluffy cat", "settings": ["on the beach"]},
]  # fmt: skip
READ = [
    PromptSet(0, "a cute dog", ["on the beach", "in the snow", "by night"], "a photo of", ["dog"]),
    PromptSet(1, "a fluffy cat", ["on the beach"], "", ["cat"]),
]
SMALL: dict[str, Any] = {"steps": 2, "width": 64, "height": 96}


@pytest.fixture(scope="module")
def pipe(golden_weights: Path) -> ConsiStory:
    return ConsiStory.from_pretrained(golden_weights)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save(folder, CONFIGS["openai"])
    return folder


def run(pipe: ConsiStory, out: Path, **others: Any) -> str:
    return evaluate(READ, out, lambda: pipe, **({"model": "small"} | SMALL | others))


def no_model() -> ConsiStory:
    raise AssertionError("nothing is to be drawn")


# --- sets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, text", [("sets.yaml", YAML), ("sets.json", json.dumps(SETS))], ids=["yaml", "json"])
def test_sets_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    sets = read_sets(tmp_path / name)
    assert sets == READ
    assert sets[0].prompts[2] == "a photo of a cute dog by night"
    assert [one.folder for one in sets] == ["001-a-cute-dog", "002-a-fluffy-cat"]
    assert [one.seeds(7) for one in sets] == [[7, 8, 9], [107]]


def test_json_needs_no_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "sets.json").write_text(json.dumps(SETS))
    assert read_sets(tmp_path / "sets.json") == READ
    (tmp_path / "sets.yaml").write_text(YAML)
    with pytest.raises(ConsistoryError, match=r"PyYAML.*pip install"):
        read_sets(tmp_path / "sets.yaml")


def test_a_concept_may_be_one_word_and_keys_be_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "sets.json").write_text(json.dumps([{**SETS[0], "concept_token": "dog", "index": 4}]))
    assert read_sets(tmp_path / "sets.json") == READ[:1]
    assert "ignored: index" in caplog.text


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "is not JSON"),
        ("{}", "holds no list"),
        ("[]", "holds no list"),
        ('["a dog"]', "set 1 of .* is not an entry"),
        ('[{"subject": "a dog"}]', "set 1 of .* is malformed"),
        ('[{"settings": ["by night"]}]', "set 1 of .* is malformed"),
        ('[{"subject": "a dog", "settings": "by night"}]', "set 1 of .* is malformed"),
        ('[{"subject": "a dog", "settings": [1]}]', "set 1 of .* is malformed"),
        ('[{"subject": "a dog", "settings": []}]', "set 1 of .*no setting"),
        ('[{"subject": "the", "settings": ["by night"]}]', "set 1 of .*no concept"),
    ],
)
def test_sets_that_are_malformed(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "sets.json"
    path.write_text(content)
    with pytest.raises(ConsistoryError, match=says) as error:
        read_sets(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, content", [("a.yaml", "- {subject: ["), ("nowhere.yaml", None)])
def test_files_that_are_no_sets(tmp_path: Path, name: str, content: str | None) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConsistoryError) as error:
        read_sets(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_sets_are_drawn_as_stories_with_masks(pipe: ConsiStory, tmp_path: Path) -> None:
    assert "2 sets are drawn" in run(pipe, tmp_path, seed=3)
    expected = pipe(subject="a cute dog", settings=READ[0].settings, style="a photo of", seed=3, **SMALL)
    folder = tmp_path / "001-a-cute-dog"
    for number in (1, 2, 3):
        assert np.array_equal(np.asarray(Image.open(folder / f"0{number}.png")), expected.images[number - 1])
        mask = np.asarray(Image.open(folder / f"mask-0{number}.png"))
        assert mask.shape == (96, 64) and set(np.unique(mask)) == {0, 255}
    assert json.loads((tmp_path / "evaluation.json").read_text())["run"] == {
        "model": "small", "seed": 3, **SMALL, "config": json.loads(json.dumps(expected.settings["config"])),
    }  # fmt: skip


def test_what_is_there_is_not_drawn_again(pipe: ConsiStory, tmp_path: Path) -> None:
    run(pipe, tmp_path)
    before = (tmp_path / "001-a-cute-dog" / "01.png").stat().st_mtime_ns
    evaluate(READ, tmp_path, no_model, model="small", **SMALL)
    (tmp_path / "002-a-fluffy-cat" / "story.json").unlink()  # as if the run had been stopped there
    calls: list[tuple[int, int]] = []
    run(pipe, tmp_path, on_step=lambda done, total: calls.append((done, total)))
    assert (tmp_path / "002-a-fluffy-cat" / "story.json").exists()
    assert (tmp_path / "001-a-cute-dog" / "01.png").stat().st_mtime_ns == before
    assert calls[-1][0] == calls[-1][1] == len(calls)


def test_other_settings_or_sets_need_another_folder(pipe: ConsiStory, tmp_path: Path) -> None:
    run(pipe, tmp_path)
    with pytest.raises(ConsistoryError, match=r"another config, seed: choose another folder"):
        run(pipe, tmp_path, seed=1, config=ConsistoryConfig.vanilla())
    other = [PromptSet(0, "a cute dog", ["in a forest"], "", ["dog"])]
    with pytest.raises(ConsistoryError, match=r"pictures of another set"):
        evaluate(other, tmp_path, no_model, model="small", **SMALL)


def test_a_prompt_without_its_concept_stops_everything(pipe: ConsiStory, tmp_path: Path) -> None:
    wrong = [READ[0], PromptSet(1, "a fluffy cat", ["by night"], "", ["dog"])]
    with pytest.raises(ConsistoryError, match=r"'dog' is not in the prompt"):
        evaluate(wrong, tmp_path / "out", lambda: pipe, model="small", **SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [({"anchors": 2}, "set 2: 2 anchors do not fit 1 pictures"),
     ({"config": ConsistoryConfig(separate_subjects=True)}, "set 1: 1 concepts are given")],
)  # fmt: skip
def test_a_set_that_does_not_fit_the_settings_stops_everything(
    pipe: ConsiStory, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConsistoryError, match=says):
        run(pipe, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["02.png", "story.html"])
def test_files_of_somebody_else_stop_everything(pipe: ConsiStory, name: str, tmp_path: Path) -> None:
    """Before a model is loaded; a page is in nobody's way, and stays."""
    own = tmp_path / READ[0].folder / name
    own.parent.mkdir()
    Image.new("RGB", (8, 8)).save(own, "PNG")
    before = own.read_bytes()
    if name == "02.png":
        with pytest.raises(ConsistoryError, match=r"02\.png is not a story's"):
            evaluate(READ, tmp_path, no_model, model="small", **SMALL)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [own]
    else:
        run(pipe, tmp_path)
    assert own.read_bytes() == before


@pytest.mark.parametrize("fails", ["before it draws", "while it draws"])
def test_settings_do_not_bind_before_there_are_pictures(pipe: ConsiStory, fails: str, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    if fails == "before it draws":
        with pytest.raises(ConsistoryError, match="2000 steps"):
            run(pipe, tmp_path, steps=2000)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(pipe, tmp_path, steps=1, on_step=interrupt)
    assert not any(tmp_path.iterdir())
    run(pipe, tmp_path)


def test_settings_bind_from_the_first_set_on(pipe: ConsiStory, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, tmp_path, on_step=interrupt)
    assert (tmp_path / READ[0].folder / "story.json").exists()
    with pytest.raises(ConsistoryError, match="another steps"):
        run(pipe, tmp_path, steps=1)


@pytest.mark.parametrize("name", ["02.png", "mask-01.png"])
def test_a_set_without_all_of_its_pictures_is_drawn_again(pipe: ConsiStory, name: str, tmp_path: Path) -> None:
    run(pipe, tmp_path)
    path = tmp_path / READ[0].folder / name
    before = path.read_bytes()
    path.unlink()
    run(pipe, tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["evaluation.json", f"{READ[0].folder}/story.json"])
def test_damaged_results_are_named(pipe: ConsiStory, name: str, tmp_path: Path) -> None:
    run(pipe, tmp_path)
    (tmp_path / name).write_text("[1")
    with pytest.raises(ConsistoryError, match=f"{name} is damaged: delete it"):
        run(pipe, tmp_path)


def test_plain_pictures_have_masks_too(pipe: ConsiStory, tmp_path: Path) -> None:
    run(pipe, tmp_path, config=ConsistoryConfig.vanilla(), steps=1)
    assert set(np.unique(np.asarray(Image.open(tmp_path / "001-a-cute-dog" / "mask-01.png")))) == {0, 255}


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores(pipe: ConsiStory, clip_folder: Path, tmp_path: Path) -> None:
    clip = CLIP.from_pretrained(clip_folder)
    table = run(pipe, tmp_path, clip=clip)
    results = json.loads((tmp_path / "evaluation.json").read_text())
    folder = tmp_path / "001-a-cute-dog"
    images = [np.asarray(Image.open(folder / f"0{i}.png")) for i in (1, 2, 3)]
    masks = [np.asarray(Image.open(folder / f"mask-0{i}.png")) for i in (1, 2, 3)]
    cut = [np.stack([np.where(mask, image[..., c], 128) for c in range(3)], -1).astype(np.uint8)
           for image, mask in zip(images, masks, strict=True)]  # fmt: skip
    aligned = torch.cosine_similarity(clip.embed_images(images), clip.embed_texts(READ[0].prompts))
    vectors = clip.embed_images(cut)
    pairs = [torch.dot(vectors[i], vectors[j]).item() for i, j in combinations(range(3), 2)]
    first, second = results["sets"]
    assert first["text_alignment"] == pytest.approx(aligned.mean().item(), abs=1e-6)
    assert first["image_similarity"] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert second["image_similarity"] is None
    both = [one["text_alignment"] for one in results["sets"]]
    assert results["scores"]["text_alignment"] == {
        "mean": pytest.approx(np.mean(both)), "standard_error": pytest.approx(abs(both[0] - both[1]) / 2), "sets": 2,
    }  # fmt: skip
    assert results["clip"] == str(clip_folder)
    assert f"{first['image_similarity']:.4f}" in table and "001-a-cute-dog" in table
    assert "mean ± standard error" in table


def test_scores_stay_without_clip(pipe: ConsiStory, clip_folder: Path, tmp_path: Path) -> None:
    """But for a set that is drawn again; an interruption meanwhile costs nothing."""

    def results() -> Any:
        return json.loads((tmp_path / "evaluation.json").read_text())

    table = run(pipe, tmp_path, clip=CLIP.from_pretrained(clip_folder))
    before = results()
    assert run(pipe, tmp_path) == table and results() == before

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / READ[1].folder / "01.png").unlink()
    with pytest.raises(KeyboardInterrupt):
        run(pipe, tmp_path, on_step=interrupt)
    assert results() == before
    assert "–" in run(pipe, tmp_path)
    assert results()["clip"] == before["clip"] and results()["sets"][0] == before["sets"][0]
    assert results()["sets"][1].keys() == {"folder", "prompts"}


def test_sets_that_are_left_out_keep_their_scores(pipe: ConsiStory, clip_folder: Path, tmp_path: Path) -> None:
    clip = CLIP.from_pretrained(clip_folder)
    run(pipe, tmp_path, clip=clip)
    before = json.loads((tmp_path / "evaluation.json").read_text())
    evaluate(READ[:1], tmp_path, no_model, **{"model": "small"} | SMALL)
    fewer = json.loads((tmp_path / "evaluation.json").read_text())
    assert (fewer["sets"], fewer["other_sets"]) == (before["sets"][:1], before["sets"][1:])
    assert fewer["scores"] == summarise(before["sets"][:1]) and fewer["clip"] == before["clip"]
    run(pipe, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == before


def test_summaries() -> None:
    rows = [{"text_alignment": x, "image_similarity": y} for x, y in ((0.1, None), (0.2, 0.5), (0.6, None))]
    assert summarise(rows) == {
        "text_alignment": {"mean": pytest.approx(0.3), "standard_error": pytest.approx(0.07**0.5 / 3**0.5), "sets": 3},
        "image_similarity": {"mean": 0.5, "standard_error": None, "sets": 1},
    }
    assert summarise([]) == {}


def test_background_is_removed() -> None:
    image = np.full((4, 6, 3), 7, np.uint8)
    mask = enlarge(np.array([[True, False, False], [False, False, True]]), (4, 6))
    assert mask.astype(int).tolist() == [[1, 1, 0, 0, 0, 0]] * 2 + [[0, 0, 0, 0, 1, 1]] * 2
    removed = remove_background(image, mask.astype(np.uint8) * 255)
    assert (removed[mask] == 7).all() and (removed[~mask] == 128).all()
    assert np.array_equal(remove_background(image, np.zeros((4, 6), np.uint8)), image)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_draws_then_scores(
    golden_weights: Path, clip_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "sets.yaml").write_text(YAML)
    out = tmp_path / "out"
    command = ["evaluate", tmp_path / "sets.yaml", "--out", out, "--model", golden_weights, "--steps", "2"]
    command += ["--width", "64", "--height", "96"]
    assert main([str(x) for x in command]) == 0
    assert "not scored: give a CLIP model with --clip" in capsys.readouterr().out
    assert main([str(x) for x in [*command, "--clip", clip_folder]]) == 0
    shown = capsys.readouterr().out
    assert "text alignment" in shown and str(out / "evaluation.json") in shown
    assert "scores" in json.loads((out / "evaluation.json").read_text())


def test_the_command_goes_on_with_the_same_model_only(golden_weights: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "sets.json").write_text(json.dumps(SETS), "utf-8-sig")
    command = ["evaluate", tmp_path / "sets.json", "--out", tmp_path / "out", "--model", golden_weights, "--steps", "1"]
    command += ["--width", "64", "--height", "64", "--clip-skip", "1"]
    assert main([str(x) for x in command]) == 0
    (folder,) = (tmp_path / "out").glob("001-*")
    assert json.loads((folder / "story.json").read_text("utf-8"))["clip_skip"] == 1
    assert main([str(x) for x in [*command, "--dtype", "float32"]]) == 0, "which it is anyway"
    capsys.readouterr()
    assert main([str(x) for x in [*command, "--spacing", "trailing", "--dtype", "bfloat16"]]) == 2
    assert "another dtype, spacing" in capsys.readouterr().err


def test_the_command_refuses_before_it_draws(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets.json").write_text(json.dumps(SETS))
    command = ["evaluate", str(tmp_path / "sets.json"), "--out", str(tmp_path / "out")]
    assert main([*command, "--clip", str(tmp_path / "nowhere")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("consistory: error:") and "nowhere" in line
    with pytest.raises(SystemExit):
        main([*command, "--seed", "1", "2"])
    assert "--seed takes one number" in capsys.readouterr().err
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(command)
    assert "leave torchrun out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
