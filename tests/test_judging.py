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


def test_a_table_is_taken_up_only_under_the_same_conditions(tmp_path: Path) -> None:
    path, scores = tmp_path / "table.json", {"row": {"0": {"main": 1.0}}}
    assert judging.read_table(path, {"steps": 10}) == {}
    judging.write(path, {"about": {"steps": 10, "hardware": "any"}, "scores": scores})
    assert judging.read_table(path, {"steps": 10}) == scores
    assert judging.read_table(path, {"steps": 20}) == {}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", tables.MEASUREMENTS)
def test_every_measurement_is_there(name: str, quick: bool, tmp_path: Path) -> None:
    _, program, *options = tables.command(name, quick, jobs=2, results=tmp_path)
    accepted = Path(program).read_text()
    assert all(f'"{option}"' in accepted for option in options if option.startswith("--"))
