"""The trainer of the embedded model: schedule, checkpoints that resume exactly, losses, and the exported folder."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from consistory.attention import AttentionControl, Site
from consistory.config import ScheduleConfig
from consistory.controlnet import ControlNet
from consistory.ddim import add_noise, alpha_bars
from consistory.unet import Conditioning
from consistory.weights.sprites import train as training
from consistory.weights.sprites.loop import Plan, Run, generator_for, resume, save, start, train, update_average
from consistory.weights.sprites.train import (
    PASSES,
    SCHEDULER_JSON,
    SNR_CAP,
    Captions,
    Denoiser,
    MatmulAttention,
    Pool,
    denoising_loss,
    export,
    load_vae,
    restore,
    sample,
    train_control,
    train_vae,
)

CPU = torch.device("cpu")
CHECKPOINT = Path(training.__file__).parent / "checkpoint"


def plan(images: int, batch: int = 4, rate: float = 1e-2) -> Plan:
    return Plan(images=images, minutes=None, batch=batch, rate=rate, warm_up=2, save_every=1e9)


def toy_run() -> Run:
    torch.manual_seed(0)
    return start(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)))


def fit(run: Run, images: int, path: Path) -> None:
    """A regression on data that depend on the step only."""

    def loss_of(step: int) -> Tensor:
        x = torch.randn(4, 5, generator=generator_for(1, step))
        return (run.model(x) - x[:, :2]).square().mean()

    train(run, plan(images), loss_of, path)


def same_tensors(a: Path, b: Path) -> bool:
    left, right = load_file(a), load_file(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class TestSchedule:
    def test_rate_rises_linearly_then_falls_to_zero(self) -> None:
        run = toy_run()
        rates = []
        for step in range(0, 101):
            run.step = step
            rates.append(Plan(images=1000, minutes=None, batch=10, rate=1.0, warm_up=10).learning_rate(run))
        assert rates[0] == pytest.approx(0.1)
        assert max(rates) == pytest.approx(rates[9], rel=0.03) and rates[9] > 0.97
        assert all(later < earlier for earlier, later in pairwise(rates[10:]))
        assert rates[50] == pytest.approx(0.5)
        assert rates[100] == pytest.approx(0.0, abs=1e-9)

    def test_minutes_count_time_already_spent(self) -> None:
        run = toy_run()
        run.seconds = 90.0
        assert Plan(images=None, minutes=6, batch=4, rate=1.0).progress(run) == pytest.approx(0.25)

    def test_a_longer_plan_continues_a_finished_run(self, tmp_path: Path) -> None:
        fit(toy_run(), 12, tmp_path / "run.safetensors")
        longer = toy_run()
        resume(longer, tmp_path / "run.safetensors")
        fit(longer, 24, tmp_path / "run.safetensors")
        assert longer.step == 6


class TestCheckpoints:
    def test_stopping_and_resuming_changes_nothing(self, tmp_path: Path) -> None:
        whole = toy_run()
        fit(whole, 24, tmp_path / "whole.safetensors")

        first = toy_run()
        stop = 3

        def until_stop(step: int) -> Tensor:
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(4, 5, generator=generator_for(1, step))
            return (first.model(x) - x[:, :2]).square().mean()

        with pytest.raises(KeyboardInterrupt):
            train(first, plan(24), until_stop, tmp_path / "parts.safetensors")
        save(first, tmp_path / "parts.safetensors")

        second = toy_run()
        resume(second, tmp_path / "parts.safetensors")
        assert second.step == stop
        fit(second, 24, tmp_path / "parts.safetensors")
        assert same_tensors(tmp_path / "whole.safetensors", tmp_path / "parts.safetensors")

    def test_the_autoencoders_stage_resumes_exactly(self, tmp_path: Path) -> None:
        for folder, lengths in {"whole": [4], "parts": [2, 4]}.items():
            (tmp_path / folder).mkdir()
            for images in lengths:
                # The rate depends on the length of the plan, so both halves of the interrupted run use the whole's.
                length = plan(4, batch=1, rate=1e-3)
                run_until(tmp_path / folder, length, images)
        assert same_tensors(tmp_path / "whole" / "vae.safetensors", tmp_path / "parts" / "vae.safetensors")

    def test_nothing_half_written_stays_behind(self, tmp_path: Path) -> None:
        path = tmp_path / "run.safetensors"
        fit(toy_run(), 8, path)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]

    def test_resume_without_a_checkpoint_starts_at_zero(self, tmp_path: Path) -> None:
        run = toy_run()
        resume(run, tmp_path / "none.safetensors")
        assert run.step == 0


def run_until(work: Path, length: Plan, images: int) -> None:
    """Run the first stage, stopped once it has seen so many images."""
    progress = Plan.progress

    def stopped(self: Plan, run: Run) -> float:
        return 1.0 if run.step * self.batch >= images else progress(self, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "progress", stopped)
        patch.setattr(training, "save_grid", lambda *args, **kwargs: None)
        train_vae(work, length, seed=0, device=CPU)


class TestAverage:
    def test_moves_towards_the_weights_and_forgets_the_start(self) -> None:
        run = toy_run()
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.fill_(1.0)
        distances = []
        for step in range(300):
            run.step = step
            update_average(run)
            distances.append(max((p - 1).abs().max().item() for p in run.average.parameters()))
        assert distances[0] > distances[10] > distances[-1]
        assert distances[-1] < 1e-6


class Constant(nn.Module):
    """Stands for a denoiser: always predicts the same noise."""

    def __init__(self, prediction: Tensor):
        super().__init__()
        self.prediction = prediction

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        return self.prediction


class TestDenoising:
    @pytest.mark.parametrize("t", [0, 100, 400, 999])
    def test_loss_is_the_error_of_the_noise_capped_by_snr(self, t: int) -> None:
        generator = generator_for(0)
        x0, eps, predicted = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
        bars = alpha_bars(ScheduleConfig.from_json(SCHEDULER_JSON))
        ids, known = torch.zeros(2, 77, dtype=torch.long), torch.ones(2, dtype=torch.bool)
        loss = denoising_loss(Constant(predicted), bars, x0, eps, torch.tensor([t, t]), ids, ids, known)  # type: ignore[arg-type]
        # Weighted so, the error of eps is the error of x0 scaled by SNR, and by the cap where SNR is above it.
        snr = bars[t] / (1 - bars[t])
        x = add_noise(x0, eps, bars[t])
        implied = (x - (1 - bars[t]).sqrt() * predicted) / bars[t].sqrt()
        assert loss.item() == pytest.approx((min(snr.item(), SNR_CAP) * (implied - x0) ** 2).mean().item(), rel=1e-3)

    def test_without_a_caption_the_conditioning_is_zero(self, tmp_path: Path) -> None:
        tokenize = Captions(tmp_path)
        model = Denoiser(tokenize.vocabulary)
        cond = model.condition(*tokenize(["a cat in space"] * 2, CPU), torch.tensor([True, False]))
        assert cond.context.shape == (2, 77, 160) and cond.pooled.shape == (2, 96)
        assert cond.context[0].any() and cond.pooled[0].any()
        assert not cond.context[1].any() and not cond.pooled[1].any()

    def test_captions_differ_in_padding_only(self, tmp_path: Path) -> None:
        tokenize = Captions(tmp_path)
        ids, ids_2 = tokenize(["a cat in space"], CPU)
        length = len(["<start>", "a", "cat", "in", "space", "<end>"])
        assert torch.equal(ids[:, :length], ids_2[:, :length])
        assert (ids[:, length:] == tokenize.vocabulary - 1).all() and (ids_2[:, length:] == 0).all()

    def test_matrix_products_equal_fused_attention(self) -> None:
        q, k, v = (torch.randn(2, 3, n, 8) for n in (10, 6, 6))
        site = Site("mid", 0, 2)
        expected = AttentionControl().cross_attention(q, k, v, site)
        torch.testing.assert_close(MatmulAttention().cross_attention(q, k, v, site), expected)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder as after both stages, with random weights."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    save(start(training.VAE(training.VAEConfig.from_json(training.VAE_JSON))), folder / "vae.safetensors")
    save(start(Denoiser(Captions(folder).vocabulary)), folder / "unet.safetensors")
    return folder


def denoiser(work: Path) -> Denoiser:
    run = start(Denoiser(Captions(work).vocabulary))
    resume(run, work / "unet.safetensors")
    assert isinstance(run.average, Denoiser)
    return run.average


def test_the_decoder_learns_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the latents, which the UNet has learned, stay as they are."""
    monkeypatch.setattr(training, "POOL", 8)
    train_vae(tmp_path, Plan(images=8, minutes=None, batch=4, rate=1e-3), 0, CPU)
    before = load_file(tmp_path / "vae.safetensors")
    train_vae(tmp_path, Plan(images=16, minutes=None, batch=4, rate=1e-3), 0, CPU, learning="decoder.")
    after = load_file(tmp_path / "vae.safetensors")
    changed = {name for name in before if name.startswith("model.") and not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.decoder.") for name in changed)


class TestResults:
    def test_latents_are_scaled_to_unit_variance(
        self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(training, "POOL", 64)
        vae = load_vae(work, CPU)
        pool = Pool.draw(vae, Captions(tmp_path), seed=5, number=0, device=CPU)
        assert pool.latents.shape == (64, 4, 32, 32) and len(pool.ids) == PASSES * 64
        assert pool.latents.std().item() == pytest.approx(1, rel=0.1)

    def test_samples_depend_on_the_generator_only(self, work: Path) -> None:
        model, vae = denoiser(work), load_vae(work, CPU)
        ids = Captions(work)(["a cat in space", "a fish in the snow"], CPU)
        first, again, other = (sample(model, vae, ids, generator_for(seed), steps=2) for seed in (1, 1, 2))
        assert first.shape == (2, 3, 64, 64) and first.min() >= 0 and first.max() <= 1
        assert torch.equal(first, again) and not torch.equal(first, other)

    def test_export_is_what_diffusers_and_transformers_read(self, work: Path, tmp_path: Path) -> None:
        from diffusers import StableDiffusionXLPipeline

        export(work, tmp_path)
        pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path).to(torch.float32)
        assert pipe.vae.config.scaling_factor == pytest.approx(load_vae(work, CPU).config.scaling_factor)
        assert pipe.config.force_zeros_for_empty_prompt

        prompts = ["a cat in space", "a red fish in the snow"]
        context, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        model = denoiser(work)
        cond = model.condition(*Captions(work)(prompts, CPU))
        # The exported weights are float16: half its precision, relative to the largest entries.
        for ours, theirs in ((cond.context, context), (cond.pooled, pooled)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 * theirs.abs().max().item())

        x, t = torch.randn(2, 4, 32, 32), torch.tensor([700, 20])
        added = {"text_embeds": pooled, "time_ids": cond.sizes}
        theirs = pipe.unet(x, t, context, added_cond_kwargs=added).sample
        ours = model.unet(x, t, Conditioning(context, pooled, cond.sizes))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-3 * theirs.abs().max().item())

    def test_a_restored_work_folder_goes_on_from_the_export(self, work: Path, tmp_path: Path) -> None:
        export(work, tmp_path / "checkpoint")
        again = tmp_path / "again"
        again.mkdir()
        restore(tmp_path / "checkpoint", again)
        for name in ("vae.safetensors", "unet.safetensors"):
            trained, restored = load_file(work / name), load_file(again / name)
            for key in (key for key in trained if key.startswith("average.")):
                assert torch.equal(restored[key], trained[key].half().float())
                assert torch.equal(restored[key.replace("average.", "model.", 1)], restored[key])
        run = start(Denoiser(Captions(again).vocabulary))
        resume(run, again / "unet.safetensors")
        assert run.step == 0 and not any(run.optimizer.state.values())

    def test_export_loads_in_the_library(self, work: Path, tmp_path: Path) -> None:
        from consistory import ConsiStory

        export(work, tmp_path)
        story = ConsiStory.from_pretrained(tmp_path)(
            subject="a cat", settings=["in space", "in the snow"], concepts=["cat"], seed=1, steps=4
        )
        assert story.images.shape == (2, 64, 64, 3)


class TestControl:
    @pytest.fixture
    def model(self) -> Denoiser:
        return training.load_exported(CHECKPOINT, CPU)[1]

    @pytest.fixture
    def silhouettes(self) -> Tensor:
        return training.render(training.sample_scenes(8, generator_for(0)))[1]

    def test_it_starts_as_the_encoder_and_changes_nothing(self, model: Denoiser, silhouettes: Tensor) -> None:
        net = training.copy_encoder(model.unet, silhouettes)
        assert torch.equal(net.mid_block.resnets[0].conv1.weight, model.unet.mid_block.resnets[0].conv1.weight)
        hint = net.hint(training.pictures_of(silhouettes))
        assert hint.mean().abs() < 1e-5 and hint.std().item() == pytest.approx(1, abs=1e-3)
        x, t = torch.randn(8, 4, 32, 32), torch.full((8,), 500)
        cond = model.condition(*(torch.zeros(8, 77, dtype=torch.int64) for _ in range(2)))
        with torch.no_grad():
            steered = training.Controlled(model, net, silhouettes).predict(x, t, cond)
            assert torch.equal(steered, model.unet(x, t, cond))

    def test_only_the_controlnet_learns(self, model: Denoiser, silhouettes: Tensor) -> None:
        net = training.copy_encoder(model.unet, silhouettes)
        controlled = training.Controlled(model, net, silhouettes[:2])
        ids = torch.zeros(2, 77, dtype=torch.int64)
        known = torch.tensor([True, False])
        predicted = controlled(torch.randn(2, 4, 32, 32), torch.tensor([900, 400]), ids, ids, known)
        predicted.square().mean().backward()
        assert net.controlnet_mid_block.weight.grad.any()
        assert all(convolution.weight.grad.any() for convolution in net.controlnet_down_blocks)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_trained_one_is_written_next_to_the_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In diffusers' layout, and a run that has ended goes on with a longer plan."""
        monkeypatch.setattr(training, "POOL", 4)
        (tmp_path / "checkpoint").symlink_to(CHECKPOINT)
        sheet = []
        monkeypatch.setattr(training, "save_grid", lambda images, path, columns: sheet.append(images))
        monkeypatch.setattr(training, "sample", lambda *_, **__: torch.zeros(8, 3, 64, 64))
        for images in (2, 4):
            train_control(tmp_path, plan(images, batch=2), 0, CPU, tmp_path / "checkpoint")
        with safe_open(tmp_path / "control.safetensors", "pt") as file:
            assert file.metadata()["step"] == "2"
        net = ControlNet.from_pretrained(tmp_path / "control")
        assert net.controlnet_mid_block.weight.any() and sheet[0].shape == (16, 3, 64, 64)
        assert ControlNetModel.from_pretrained(tmp_path / "control").num_parameters() == sum(
            parameter.numel() for parameter in net.parameters()
        )
