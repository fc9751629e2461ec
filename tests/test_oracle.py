"""The oracle reads rendered scenes right, also when they are blurred, noisy or in other batches."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from consistory.config import VAEConfig
from consistory.vae import VAE
from consistory.weights.sprites import oracle as module
from consistory.weights.sprites.loop import Plan, generator_for
from consistory.weights.sprites.oracle import PROPERTIES, WEIGHTS, Oracle, degrade, evaluate, oracle_loss, train_oracle
from consistory.weights.sprites.train import VAE_JSON, restore
from consistory.weights.sprites.world import SUBJECTS, render, sample_scenes


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle.load()


def test_reads_fresh_renders(oracle: Oracle) -> None:
    scores = evaluate(oracle, sample_scenes(1000, generator_for(101), second_subject=0.0))
    for name in PROPERTIES:
        assert scores[name] >= 0.97, scores
    assert scores["mask"] >= 0.9, scores


def test_reads_renders_that_look_generated(oracle: Oracle) -> None:
    def blur_and_noise(images: Tensor) -> Tensor:
        blurred = torch.lerp(images, F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False), 0.5)
        return (blurred + 0.02 * torch.randn(images.shape, generator=generator_for(102))).clamp(0, 1)

    scores = evaluate(oracle, sample_scenes(500, generator_for(103), second_subject=0.0), blur_and_noise)
    assert min(scores[name] for name in ("subject", "setting", "main")) >= 0.95, scores
    assert scores["mask"] >= 0.85, scores


def test_reading_does_not_depend_on_the_batch(oracle: Oracle) -> None:
    images, _ = render(sample_scenes(6, generator_for(104), second_subject=0.0))
    pixels = (images * 255).byte().permute(0, 2, 3, 1)
    together, alone = oracle.read(pixels), oracle.read(pixels[2:3])
    assert together.mask.shape == (6, 64, 64) and together.mask.dtype == torch.bool
    assert torch.equal(together.mask[2:3], alone.mask)
    for name, answers in PROPERTIES.items():
        assert getattr(together, name).shape == (6,)
        assert together.probabilities[name].shape == (6, answers)
        torch.testing.assert_close(together.probabilities[name].sum(dim=-1), torch.ones(6))
        torch.testing.assert_close(together.probabilities[name][2:3], alone.probabilities[name])


def test_a_change_of_subject_changes_only_that_answer(oracle: Oracle) -> None:
    scenes = sample_scenes(len(SUBJECTS), generator_for(105), second_subject=0.0)
    one = scenes[torch.zeros(len(SUBJECTS), dtype=torch.long)]
    one.subject = torch.arange(len(SUBJECTS))
    reading = oracle.read((render(one)[0] * 255).byte().permute(0, 2, 3, 1))
    assert torch.equal(reading.subject, one.subject)
    assert (reading.setting == one.setting).all() and (reading.main == one.main).all()


def test_a_subject_in_a_mirror_faces_the_other_way(oracle: Oracle) -> None:
    images, _ = render(sample_scenes(200, generator_for(109), second_subject=0.0))
    pixels = (images * 255).byte().permute(0, 2, 3, 1)
    differs = oracle.read(pixels).facing != oracle.read(pixels.flip(2)).facing
    assert differs.float().mean() >= 0.97


def test_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size <= 2**20


def test_properties_do_not_teach_the_mask() -> None:
    torch.manual_seed(0)
    fresh = Oracle()
    logits, _ = fresh(torch.rand(2, 3, 64, 64))
    torch.stack([x.square().sum() for x in logits.values()]).sum().backward()
    assert fresh.mask.weight.grad is None
    assert fresh.up_fine.conv.weight.grad is not None


def test_learning_to_see_which_way_subjects_face_changes_no_other_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_file(WEIGHTS)
    shutil.copy(WEIGHTS, tmp_path / "weights.safetensors")
    monkeypatch.setattr(module, "WEIGHTS", tmp_path / "weights.safetensors")
    restore(WEIGHTS.parent / "checkpoint", tmp_path)
    plan = Plan(images=16, minutes=None, batch=8, rate=1e-3)
    train_oracle(tmp_path, plan, seed=0, device=torch.device("cpu"), facing_only=True)
    after = load_file(tmp_path / "weights.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("facing" in name for name in changed)


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    fresh = Oracle()
    scenes = sample_scenes(16, generator_for(106), second_subject=0.0)
    images, masks = render(scenes)
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = oracle_loss(fresh, images, scenes, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_degraded_pictures_stay_pictures_of_the_same_thing() -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig.from_json(VAE_JSON)).requires_grad_(False)
    images, _ = render(sample_scenes(16, generator_for(107)))
    degraded, again = (degrade(images, vae, generator_for(108)) for _ in range(2))
    assert degraded.shape == images.shape and degraded.min() >= 0 and degraded.max() <= 1
    assert torch.equal(degraded, again)
    assert 0 < (degraded[2:] - images[2:]).abs().mean() < 0.1  # the first two went through an untrained autoencoder
