from __future__ import annotations

import copy
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from parity import randn, randomise, relative_error
from test_unet import config_json
from torch import Tensor

from consistory import ConsistoryConfig, FreeU, QueryBlend, ddim
from consistory.attention import AttentionControl
from consistory.config import ScheduleConfig, UNetConfig
from consistory.correspondence import nearest_in_regions, nearest_patches, smooth
from consistory.injection import Injection, plan_injection
from consistory.masks import average_maps, concept_masks, draw_dropout, region_bits, subject_masks
from consistory.sdsa import Consistent, RecordQueries, Sharing
from consistory.story import Plan, State, Told, blend_weight, denoise, tell
from consistory.unet import Conditioning, UNet

SCHEDULE = ScheduleConfig()
TOKENS = 5
REFERENCE = ConsistoryConfig.reference()
VANILLA = ConsistoryConfig.vanilla()
PRESETS = {"default": ConsistoryConfig(), "reference": REFERENCE, "paper": ConsistoryConfig.paper()}


@pytest.fixture(scope="module")
def unet() -> UNet:
    """SDXL's topology in small: the finest level without attention, two transformer blocks in the coarsest.

    In float64: latents and masks stay in float32, where its rounding errors do not survive. In float32 they can carry a
    patch over Otsu's threshold, and then two ways to compute the same story part for good.
    """
    config = config_json(
        [8, 16, 16], [False, True, True], transformer_layers_per_block=[1, 1, 2], attention_head_dim=[1, 1, 2]
    )
    unet = UNet(UNetConfig.from_json(config)).eval().requires_grad_(False)
    randomise(unet)
    # Small predictions keep latents near their initial scale, where rounding does not grow from step to step.
    unet.conv_out.weight *= 0.2
    return unet.double()


def make_plan(
    unet: UNet,
    config: ConsistoryConfig | None = None,
    *,
    images: int = 3,
    anchors: int = 2,
    steps: int = 10,
    latent_size: tuple[int, int] = (8, 12),
) -> Plan:
    """Image i has the same prompt in every plan, however many there are."""
    context = torch.stack([2 * randn(TOKENS, 20, seed=100 + i) for i in range(images)]).double()
    pooled = torch.stack([randn(12, seed=200 + i) for i in range(images)]).double()
    weights = torch.zeros(images, TOKENS, 2)
    weights[:, 1, 0] = 1
    weights[:, 2:4, 1] = 0.5
    return Plan(
        unet=unet, schedule=SCHEDULE,
        cond=Conditioning(
            torch.cat([torch.zeros_like(context), context]), torch.cat([torch.zeros_like(pooled), pooled]),
            torch.tensor([64.0, 96, 0, 0, 64, 96]).expand(2 * images, 6),
        ),
        token_weights=weights, config=config or ConsistoryConfig(), steps=steps, guidance=3.0, anchors=anchors,
        seed=11, latent_size=latent_size,
    )  # fmt: skip


def noise(plan: Plan) -> Tensor:
    images = len(plan.token_weights)
    return torch.stack([randn(4, *plan.latent_size, seed=i) for i in range(images)])


@torch.no_grad()
def told(unet: UNet, config: ConsistoryConfig | None = None, **others: Any) -> Told:
    plan = make_plan(unet, config, **others)
    return tell(plan, noise(plan))


# --- the method, written out without any saving -----------------------------------------------------------------------


def scheduler(steps: int) -> DDIMScheduler:
    oracle = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    oracle.set_timesteps(steps)
    return oracle


def naive_tell(plan: Plan, x: Tensor) -> Told:
    """Two passes from the same noise, both from the first step; vanilla calls are whole calls, at useless steps too."""
    if not plan.config.injection:
        return Told(naive_pass(plan, x, plan.steps, None)[0], {}, {})
    timesteps = ddim.timesteps(plan.schedule, plan.steps)
    dift_step = min(range(plan.steps), key=lambda i: abs(timesteps[i] - 261))
    branch = int(plan.steps * plan.config.injection_window[0])
    stop = plan.steps if plan.config.first_pass == "full" else max(dift_step + 1, branch)
    _, masks, features, concepts = naive_pass(plan, x, stop, None)
    dift = smooth(features[dift_step])
    others = ~torch.eye(len(x), plan.anchors, dtype=torch.bool)
    if plan.config.separate_subjects:
        nearest = {s: nearest_in_regions(dift, size, concepts[s], others) for s, size in plan.sizes.items()}
    else:
        nearest = {s: nearest_patches(dift, size, masks[s], others) for s, size in plan.sizes.items()}
    injection = plan_injection(nearest[2], masks[2], plan.config.alpha)
    return Told(naive_pass(plan, x, plan.steps, injection)[0], masks, nearest)


def naive_pass(
    plan: Plan, x: Tensor, stop: int, injection: Injection | None
) -> tuple[Tensor, dict[int, Tensor], list[Tensor], dict[int, Tensor]]:
    """Latents, masks, features of every step and masks of each concept, after the first `stop` steps.

    Means and DDIM steps are the library's, so that not even a rounding error differs; diffusers checks those elsewhere.
    """
    config, n = plan.config, len(x)
    timesteps = ddim.timesteps(plan.schedule, plan.steps)
    alpha_bars = ddim.alpha_bars(plan.schedule)
    h, w = plan.latent_size
    sizes = {2: (h // 2, w // 2), 4: (h // 4, w // 4)}
    kept = {
        s: draw_dropout(plan.seed, s, plan.steps, plan.anchors, a * b, config.dropout) for s, (a, b) in sizes.items()
    }
    first, last = config.injection_window
    blend = config.query_blend
    blended = int(blend.fraction * plan.steps) if blend else 0
    history: list[Tensor] = []
    features: list[Tensor] = []

    def masks() -> dict[int, Tensor]:
        if not config.masking:
            return {s: torch.ones(n, a * b, dtype=torch.bool) for s, (a, b) in sizes.items()}
        return subject_masks(average(), sizes[4], sizes)

    def average() -> Tensor:
        recent = history[-config.mask_history :] if config.mask_history else history
        return average_maps(recent)

    for i, t in enumerate(timesteps[:stop]):
        sample = torch.cat([x, x]).double()
        vanilla = None
        if blend and i <= blended:
            recorder = RecordQueries()
            plan.unet(sample, t, plan.cond, recorder, config.freeu)
            vanilla = recorder, blend.start + (blend.end - blend.start) * i / max(blended, 1)
        sharing = None
        if config.sdsa and i > 0:
            keys = {s: mask[: plan.anchors] & kept[s][i] for s, mask in masks().items()}
            sharing = Sharing(keys, ~torch.eye(n, plan.anchors, dtype=torch.bool), vanilla)
            if config.separate_subjects:
                bits = {s: region_bits(mask) for s, mask in concept_masks(average(), sizes[4], sizes).items()}
                sharing = replace(sharing, regions={s: (bit, bit[: plan.anchors]) for s, bit in bits.items()})
        active = injection if int(first * plan.steps) <= i <= int(last * plan.steps) else None
        control = Consistent(plan.token_weights, 4, sharing, active, 2)
        unconditional, conditional = plan.unet(sample, t, plan.cond, control, config.freeu).float().chunk(2)
        eps = unconditional + plan.guidance * (conditional - unconditional)
        x = ddim.step(x, eps, alpha_bars[t], ddim.alpha_bar_after(plan.schedule, plan.steps, t))
        history.append(average_maps(control.cross_maps))
        assert control.dift is not None
        features.append(control.dift)
    return x, masks(), features, concept_masks(average(), sizes[4], sizes)


CONFIGS = PRESETS | {
    "freeu": replace(REFERENCE, freeu=FreeU()),
    "no-sdsa": replace(REFERENCE, sdsa=False),
    "late-injection": ConsistoryConfig(injection_window=(0.8, 0.9)),
    "no-mask": ConsistoryConfig(masking=False),
    "separate-subjects": ConsistoryConfig(separate_subjects=True),
    "no-injection": ConsistoryConfig(injection=False),
    "no-blending": ConsistoryConfig(query_blend=None),
    "long-blending-short-history": ConsistoryConfig(query_blend=QueryBlend(fraction=0.3), mask_history=2),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_method_written_out(unet: UNet, name: str) -> None:
    plan = make_plan(unet, CONFIGS[name])
    actual, expected = tell(plan, noise(plan)), naive_tell(plan, noise(plan))
    assert relative_error(actual.latents, expected.latents) <= 1e-6
    assert actual.masks.keys() == expected.masks.keys()
    for stride, mask in expected.masks.items():
        assert torch.equal(actual.masks[stride], mask)
        assert torch.equal(actual.nearest[stride].index, expected.nearest[stride].index)
        torch.testing.assert_close(actual.nearest[stride].distance, expected.nearest[stride].distance)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 11, 12])
def test_any_number_of_steps(unet: UNet, steps: int) -> None:
    plan = make_plan(unet, REFERENCE, steps=steps)
    actual, expected = tell(plan, noise(plan)), naive_tell(plan, noise(plan))
    assert actual.latents.isfinite().all()
    assert relative_error(actual.latents, expected.latents) <= 1e-6


@torch.no_grad()
def test_vanilla_is_plain_sampling_with_guidance(unet: UNet) -> None:
    plan = make_plan(unet, VANILLA)
    x = noise(plan)
    actual = tell(plan, x)
    oracle = scheduler(plan.steps)
    for t in oracle.timesteps:
        unconditional, conditional = unet(torch.cat([x, x]).double(), t, plan.cond).float().chunk(2)
        x = oracle.step(unconditional + 3.0 * (conditional - unconditional), t, x).prev_sample
    assert relative_error(actual.latents, x) <= 1e-6
    assert actual.masks == {}
    assert actual.nearest == {}


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_guidance_1_needs_no_unconditional_half(unet: UNet, config: ConsistoryConfig) -> None:
    plan = replace(make_plan(unet, config), guidance=1.0)
    n, cond = len(plan.token_weights), plan.cond
    assert isinstance(cond.context, Tensor)
    alone = Conditioning(cond.context[n:], cond.pooled[n:], cond.sizes[n:], guided=False)
    x = noise(plan)
    actual, expected = tell(replace(plan, cond=alone), x), tell(plan, x)
    assert relative_error(actual.latents, expected.latents) <= 1e-6
    assert all(torch.equal(actual.masks[stride], mask) for stride, mask in expected.masks.items())


# --- what depends on what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_anchors_do_not_depend_on_extras(unet: UNet, config: ConsistoryConfig) -> None:
    few, many = (told(unet, config, images=images) for images in (2, 4))
    torch.testing.assert_close(many.latents[:2], few.latents, atol=1e-5, rtol=0)
    for stride, mask in few.masks.items():
        assert torch.equal(many.masks[stride][:2], mask)


def test_extras_do_not_depend_on_each_other(unet: UNet) -> None:
    few, many = (told(unet, images=images) for images in (3, 4))
    torch.testing.assert_close(many.latents[2], few.latents[2], atol=1e-5, rtol=0)


def test_extras_depend_on_anchors(unet: UNet) -> None:
    plan = make_plan(unet)
    x = noise(plan)
    other = x.clone()
    other[0] = x[0].flip(-1)
    with torch.no_grad():
        before, after = tell(plan, x).latents, tell(plan, other).latents
    for i in range(3):
        assert relative_error(after[i], before[i]) > 1e-3


ABLATIONS = {
    "sdsa": replace(REFERENCE, sdsa=False),
    "masking": replace(REFERENCE, masking=False),
    "separate-subjects": replace(REFERENCE, separate_subjects=True),
    "separate-subjects-sdsa": replace(REFERENCE, separate_subjects=True, injection=False),
    "dropout": replace(REFERENCE, dropout=0.0),
    "blending": replace(REFERENCE, query_blend=None),
    "blending-end": replace(REFERENCE, query_blend=QueryBlend(end=0.1)),
    "blending-fraction": replace(REFERENCE, query_blend=QueryBlend(end=0.81836735, fraction=0.4)),
    "injection": replace(REFERENCE, injection=False),
    "alpha": replace(REFERENCE, alpha=0.4),
    "window": replace(REFERENCE, injection_window=(0.1, 0.6)),
    "dift": replace(REFERENCE, dift_timestep=700),
    "history": replace(REFERENCE, mask_history=1),
    "freeu": replace(REFERENCE, freeu=FreeU()),
    "first-pass": replace(REFERENCE, first_pass="dift"),
}


@pytest.fixture(scope="module")
def reference(unet: UNet) -> Told:
    return told(unet, REFERENCE)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_setting_counts(unet: UNet, reference: Told, name: str) -> None:
    assert relative_error(told(unet, ABLATIONS[name]).latents, reference.latents) > 1e-4


def test_a_single_concept_has_nothing_to_be_separated_from(unet: UNet) -> None:
    plan = make_plan(unet)
    plan = replace(plan, token_weights=plan.token_weights[..., :1])
    separate = replace(plan, config=replace(plan.config, separate_subjects=True))
    with torch.no_grad():
        together, apart = (tell(each, noise(plan)) for each in (plan, separate))
    assert relative_error(apart.latents, together.latents) <= 1e-6
    assert torch.equal(apart.masks[2], together.masks[2])


def test_seed_of_dropout_counts(unet: UNet, reference: Told) -> None:
    plan = replace(make_plan(unet, REFERENCE), seed=12)
    with torch.no_grad():
        assert relative_error(tell(plan, noise(plan)).latents, reference.latents) > 1e-4


def test_the_host_waits_for_nothing_within_a_step(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, PyTorch itself reports whatever synchronises; on a CPU, at least nobody asks for a number."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = plan_on(device, make_plan(copy.deepcopy(unet).to(device), REFERENCE))
    x = noise(plan).to(device)
    told = tell(plan, x)
    injection = plan_injection(told.nearest[2], told.masks[2], 0.8)

    def waits(*_: Any, **__: Any) -> None:
        raise AssertionError("a step reads a value of a tensor")

    for name in ("item", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, waits)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        states = list(denoise(plan, State(0, x, []), plan.steps, injection))
    finally:
        torch.cuda.set_sync_debug_mode("default") if device.type == "cuda" else None
    monkeypatch.undo()
    torch.testing.assert_close(states[-1].x, told.latents)


def plan_on(device: torch.device, plan: Plan) -> Plan:
    cond = Conditioning(*(getattr(plan.cond, name).to(device) for name in ("context", "pooled", "sizes")))
    return replace(plan, cond=cond, token_weights=plan.token_weights.to(device))


def test_global_random_numbers_are_neither_used_nor_drawn(unet: UNet, reference: Told) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = told(unet, REFERENCE)
    assert torch.equal(again.latents, reference.latents)
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_vanilla_queries_end_with_their_step(unet: UNet) -> None:
    """For SDXL they are 0.1 GiB a sample."""
    plan = make_plan(unet, replace(REFERENCE, query_blend=QueryBlend(fraction=0.5)), steps=6)
    recorded: list[weakref.ref[RecordQueries]] = []
    for state in denoise(plan, State(0, noise(plan), []), 4):
        recorded.append(weakref.ref(state.vanilla))
        assert [each() is None for each in recorded] == [True] * (state.step - 1) + [False]


@torch.no_grad()
def test_a_plan_can_be_told_again(unet: UNet) -> None:
    plan = make_plan(unet)
    x = noise(plan)
    before = x.clone()
    first = tell(plan, x)
    assert torch.equal(x, before)
    assert torch.equal(tell(plan, x).latents, first.latents)


@torch.no_grad()
def test_precision_is_the_models_but_latents_stay_in_float32(unet: UNet) -> None:
    half, plan = copy.deepcopy(unet).bfloat16(), make_plan(unet, VANILLA)
    cond = Conditioning(plan.cond.context.bfloat16(), plan.cond.pooled.bfloat16(), plan.cond.sizes)
    for config, error in ((VANILLA, 0.05), (ConsistoryConfig(), 1.0)):  # what the method selects may differ
        coarse = tell(replace(plan, unet=half, cond=cond, config=config), noise(plan)).latents
        assert coarse.dtype == torch.float32
        assert relative_error(coarse, told(unet, config).latents) < error


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "reference"])
def test_injection_steps_are_a_tenth_to_a_third(unet: UNet, name: str) -> None:
    for n in range(1, 1001):
        plan = make_plan(unet, PRESETS[name], steps=n, latent_size=(8, 8))
        assert plan.injection_steps == range(n // 10, n // 3 + 1)


def test_the_papers_injection_is_between_timesteps_680_and_900(unet: UNet) -> None:
    plan = make_plan(unet, ConsistoryConfig.paper(), steps=50)
    assert list(plan.injection_steps) == [i for i, t in enumerate(plan.timesteps) if 680 <= t <= 900]


@pytest.mark.parametrize("steps, step", [(50, 36), (19, 13), (49, 35), (1, 0)])
def test_features_come_from_timestep_261(unet: UNet, steps: int, step: int) -> None:
    plan = make_plan(unet, steps=steps)
    assert plan.dift_step == step
    if steps > 1:
        assert plan.timesteps[step] == 261


def test_features_come_from_the_nearest_timestep(unet: UNet) -> None:
    """30 steps are 33 apart: 265 is the nearest to 261."""
    plan = make_plan(unet, steps=30)
    assert plan.timesteps[plan.dift_step] == 265


@pytest.mark.parametrize("steps", [10, 19, 30, 50])
def test_blending_weights_equal_the_recorded_ones(golden: Any, steps: int) -> None:
    recorded = golden("algo_units")[0][f"query_strength_n{steps}"].tolist()
    weights = [blend_weight(REFERENCE, step, steps) for step in range(steps)]
    assert weights[: len(recorded)] == pytest.approx(recorded, abs=1e-7)
    assert set(weights[len(recorded) :]) == {None}


def test_the_papers_blending_weights() -> None:
    weights = [blend_weight(ConsistoryConfig.paper(), step, 50) for step in range(6)]
    assert weights == [pytest.approx(v) for v in (0.9, 0.875, 0.85, 0.825, 0.8)] + [None]


def test_blending_acts_up_to_a_tenth_of_the_steps() -> None:
    for n in range(1, 1001):
        last = n // 10
        assert blend_weight(REFERENCE, last, n) is not None
        assert blend_weight(REFERENCE, last + 1, n) is None
        assert blend_weight(replace(REFERENCE, query_blend=None), last, n) is None


@torch.no_grad()
@pytest.mark.parametrize("config", [*PRESETS.values(), VANILLA], ids=[*PRESETS, "vanilla"])
@pytest.mark.parametrize("steps", [1, 2, 11])
def test_progress_counts_every_step_of_both_passes(unet: UNet, config: ConsistoryConfig, steps: int) -> None:
    plan, calls = make_plan(unet, config, steps=steps, latent_size=(8, 8)), []
    tell(plan, noise(plan), lambda done, total: calls.append((done, total)))
    total = calls[0][1]
    assert calls == [(done, total) for done in range(1, total + 1)]
    assert total >= steps


class Counting:
    """Stands in for a UNet: passes every call on and counts it by kind and control."""

    def __init__(self, unet: UNet) -> None:
        self.unet, self.calls = unet, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)

    def encode(self, x: Tensor, t: Any, cond: Conditioning, control: AttentionControl) -> Any:
        self.calls[f"encode {self._kind(control)}"] += 1
        return self.unet.encode(x, t, cond, control)

    def decode(self, state: Any, control: AttentionControl, freeu: FreeU | None = None) -> Tensor:
        self.calls[f"decode {self._kind(control)}"] += 1
        return self.unet.decode(state, control, freeu)

    def decode_blocks(self, blocks: int, state: Any, control: AttentionControl, freeu: FreeU | None) -> Tensor:
        self.calls[f"{blocks} decoder blocks {self._kind(control)}"] += 1
        return self.unet.decode_blocks(blocks, state, control, freeu)

    @staticmethod
    def _kind(control: AttentionControl) -> str:
        if not isinstance(control, Consistent):
            return "vanilla"
        return "injecting" if control.injection else "consistent"


# First pass, then second pass, of 50 steps. Injection acts at steps 5 ... 16; the second pass begins there.
WORK = {
    "default": Counter({
        # Blending at steps 1 ... 5; the second pass begins with the queries that the first one recorded at step 5.
        "encode consistent": 37 + 33, "encode injecting": 12,
        "decode consistent": 37 + 33, "decode injecting": 12, "2 decoder blocks vanilla": 5,
    }),
    "reference": Counter({
        "encode consistent": 50 + 33, "encode injecting": 12,
        "decode consistent": 50 + 33, "decode injecting": 12, "2 decoder blocks vanilla": 5,
    }),
    # Blending at steps 1 ... 4; injection at 5 ... 15.
    "paper": Counter({
        "encode consistent": 37 + 34, "encode injecting": 11,
        "decode consistent": 37 + 34, "decode injecting": 11, "2 decoder blocks vanilla": 4,
    }),
    "vanilla": Counter({"encode consistent": 50, "decode consistent": 50}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", WORK)
def test_work_of_fifty_steps(unet: UNet, name: str) -> None:
    counting = Counting(unet)
    plan = make_plan(unet, (PRESETS | {"vanilla": VANILLA})[name], images=2, anchors=1, steps=50, latent_size=(8, 8))
    tell(replace(plan, unet=counting), noise(plan))  # type: ignore[arg-type]
    assert counting.calls == WORK[name]
