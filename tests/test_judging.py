"""What the measurements in bench/ say of pictures, on readings made by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from consistory.weights.sprites.oracle import PROPERTIES, Reading
from consistory.weights.sprites.world import SETTINGS, SUBJECTS

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import ablation
import judging
import tables
from measure import write

from consistory import ConsiStory


def reading(**values: list[int]) -> Reading:
    fields = {name: torch.tensor(values.get(name, [0, 0, 0])) for name in PROPERTIES}
    return Reading(**fields, mask=torch.zeros(3, 64, 64, dtype=torch.bool), probabilities={})


def test_pairs_that_agree() -> None:
    found = judging.agreements(reading(main=[1, 1, 2], second=[3, 3, 3], pattern=[0, 1, 2]))
    assert found == {"main": pytest.approx(1 / 3), "second": 1, "pattern": 0, "all": 0}
    assert judging.agreements(reading(main=[1, 1, 2]))["all"] == pytest.approx(1 / 3)


def test_pairs_that_differ() -> None:
    assert ablation.differing(torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)
    assert ablation.differing(torch.tensor([1, 1, 1])) == 0


def test_pictures_that_show_what_is_asked_for() -> None:
    subject, settings = judging.draw_set(5, images=3)
    right = [SETTINGS.index(setting) for setting in settings]
    shown = reading(subject=[SUBJECTS.index(subject)] * 3, setting=[right[0], right[0], right[2]])
    assert judging.alignment(shown, 5) == {"subject": 1, "setting": pytest.approx(2 / 3)}


def test_means_have_standard_errors_and_leave_out_what_is_unknown() -> None:
    assert judging.mean_and_error([1, 2, math.nan, 3]) == {"mean": 2, "standard error": pytest.approx(1 / math.sqrt(3))}


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("name", ["full", "no SDSA"])
def test_a_first_pass_leads_to_the_story_without_injection(
    monkeypatch: pytest.MonkeyPatch, name: str, steps: int
) -> None:
    pipe, seen = ConsiStory.from_pretrained("sprites"), ablation.FirstPass()
    monkeypatch.setattr(ablation, "pipe", pipe, raising=False)
    row = ablation.ROWS[name]
    story = judging.tell(pipe, 1, steps, row.config, images=3, observer=seen)
    assert row.first_pass is not None
    expected = judging.tell(pipe, 1, steps, ablation.ROWS[row.first_pass].config, images=3)
    found = seen.without_injection(story)
    assert torch.equal(found.latents, expected.latents) and (found.images == expected.images).all()
    assert steps == 1 or not torch.equal(story.latents, expected.latents)


def test_a_row_that_comes_with_another_is_not_told_itself() -> None:
    missing = ablation.missing({"full": {"0": {}}}, lambda row: 1)
    assert {name for name, _ in missing} == ablation.ROWS.keys() - {"full", "no injection", "vanilla"}


def test_a_table_is_taken_up_only_under_the_same_conditions(tmp_path: Path) -> None:
    path, scores = tmp_path / "table.json", {"row": {"0": {"main": 1.0}}}
    assert judging.read_table(path, {"steps": 10}) == {}
    write(path, {"about": {"steps": 10, "hardware": "any"}, "scores": scores})
    assert judging.read_table(path, {"steps": 10}) == scores
    assert judging.read_table(path, {"steps": 20}) == {}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", tables.MEASUREMENTS)
def test_every_measurement_is_there(name: str, quick: bool, tmp_path: Path) -> None:
    _, program, *options = tables.command(name, quick, jobs=2, results=tmp_path)
    accepted = Path(program).read_text()
    assert all(f'"{option}"' in accepted for option in options if option.startswith("--"))
