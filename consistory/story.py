"""The whole algorithm (Tewel et al. 2024). Read from `tell` downwards.

Two passes over the same noise. The first shares the subject by attention alone and yields, at t = 261, features that
tell which patches of two images show the same part of the subject. The second starts again and, over some early steps,
also copies features between such patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from consistory.kernels.precision import at_least_float32

from . import ddim
from .attention import AttentionControl
from .config import ConsistoryConfig, ScheduleConfig
from .controlnet import Steering, add_residuals
from .correspondence import Nearest, nearest_in_regions, nearest_patches, smooth
from .injection import Injection, plan_injection
from .masks import Size, average_maps, concept_masks, draw_dropout, region_bits, subject_masks
from .recording import Call, Recorded, RecordedCall, Recorder
from .sdsa import Consistent, RecordQueries, Sharing
from .unet import Conditioning, UNet

Masks = dict[int, Tensor]  # {latent stride: bool [N, P]}
# A step, the anchors' latents before it and the model's guided output [A, 4, h, w] -> their latents after it.
Follow = Callable[[int, Tensor, Tensor], Tensor]


class Observer:
    """Looks on while a story is told. This class itself does nothing; `consistory.explain.Trace` takes notes."""

    def stage(self, name: str) -> None:
        """A stage begins: "prompts", "first pass", "correspondence", "second pass", "pictures", then "done"."""

    def control(self, plan: Plan, state: State, control: Consistent) -> AttentionControl:
        """Before a consistent call: what the UNet is called with, the control itself or one around it."""
        return control

    def step(self, plan: Plan, before: State, after: State, output: Tensor) -> None:
        """After a step. output: [N, 4, h, w], what the model predicted, guided."""


@dataclass(frozen=True)
class Plan:
    """Everything that stays the same while a story is told.

    cond: of N images' samples.  token_weights: [N, 77, K], see `Tokenizer.concept_positions`.
    guidance: one for all images, or one each, [N, 1, 1, 1]; unless `cond` is guided, there is none.
    anchors: A; the first A images share their subject with all.  seed: of mask dropout.
    recorded: the A anchors if they were drawn before; then none of the N images is one.
    recorder: writes down what later images will need of the anchors.
    controls: ControlNets, whose residuals go to the consistent and to the vanilla call alike.
    observer: told of everything that happens; changes nothing.
    follow: where the anchors go next, if they are photos that DDIM must not lead away from (App. E).
    anchors_read: whether anchors read each other; photos do not.  align_keys: see `Sharing`.
    """

    unet: UNet
    schedule: ScheduleConfig
    cond: Conditioning
    token_weights: Tensor
    config: ConsistoryConfig
    steps: int
    guidance: float | Tensor
    anchors: int
    seed: int
    latent_size: Size
    recorded: Recorded | None = None
    recorder: Recorder | None = None
    controls: tuple[Steering, ...] = ()
    observer: Observer = field(default_factory=Observer)
    follow: Follow | None = None
    anchors_read: bool = True
    align_keys: bool = False

    @cached_property
    def timesteps(self) -> list[int]:
        return ddim.timesteps(self.schedule, self.steps)

    @cached_property
    def alpha_bars(self) -> Tensor:
        """[train_steps], see `ddim.alpha_bars`."""
        return ddim.alpha_bars(self.schedule)

    @cached_property
    def sizes(self) -> dict[int, Size]:
        """{stride: height and width in patches} of the attended resolutions, finest first."""
        h, w = self.latent_size
        return {stride: (h // stride, w // stride) for stride in self.unet.strides}

    @cached_property
    def dift_step(self) -> int:
        """The step nearest to t = 261."""
        return min(range(self.steps), key=lambda i: abs(self.timesteps[i] - self.config.dift_timestep))

    @cached_property
    def injection_steps(self) -> range:
        first, last = (int(self.steps * fraction) for fraction in self.config.injection_window)
        return range(first, last + 1)

    @cached_property
    def share(self) -> Tensor:
        """bool [N, A]: every image reads every anchor but itself."""
        n, device = len(self.token_weights), self.token_weights.device
        if self.recorded is not None:
            return torch.ones(n, self.anchors, dtype=torch.bool, device=device)
        share = ~torch.eye(n, self.anchors, dtype=torch.bool, device=device)
        share[: self.anchors] &= self.anchors_read
        return share

    @cached_property
    def kept_keys(self) -> dict[int, Tensor]:
        """{stride: bool [steps, A, P]}: keys that survive dropout, drawn before the first step."""
        return {
            s: draw_dropout(self.seed, s, self.steps, self.anchors, h * w, self.config.dropout).to(self.share.device)
            for s, (h, w) in self.sizes.items()
        }


@dataclass(frozen=True)
class State:
    """Between two steps: `step` is the next one, x [N, 4, h, w] its input.

    cross_maps: one [N, P, K] for each past step that a mask averages over.
    dift: [N, C, h, w] features of the step just made, if that was `Plan.dift_step`.
    vanilla: the next step's vanilla queries, filled in that step. Both passes go through the state where injection
        starts, and the second finds them there.
    """

    step: int
    x: Tensor
    cross_maps: list[Tensor]
    dift: Tensor | None = None
    vanilla: RecordQueries = field(default_factory=RecordQueries)


@dataclass(frozen=True)
class Told:
    """latents: float [N, 4, h, w]. masks, nearest: what injection used, per stride; empty if there was none."""

    latents: Tensor
    masks: Masks
    nearest: dict[int, Nearest]


OnStep = Callable[[int, int], None]  # steps done, steps in all


def tell(plan: Plan, x: Tensor, on_step: OnStep = lambda done, total: None) -> Told:
    """Denoise N latents x [N, 4, h, w] into pictures of one subject. Calls on_step after each step of either pass."""
    start = State(0, x, [])
    plan.observer.stage("first pass")
    if not plan.config.injection:
        for state in denoise(plan, start, plan.steps):
            on_step(state.step, plan.steps)
        return Told(state.x, {}, {})

    # Pass 1: up to the step that yields DIFT features. Until injection starts, pass 2 would only repeat it.
    branch = plan.injection_steps.start
    first = plan.steps if plan.config.first_pass == "full" else max(plan.dift_step + 1, branch)
    total = first + plan.steps - branch
    resume = start
    for state in denoise(plan, start, first):
        on_step(state.step, total)
        if state.step == branch:
            resume = state
        if state.dift is not None:
            dift = state.dift
    regions = current_regions(plan, state)
    masks = {s: region.any(dim=1) for s, region in regions.items()}

    # Correspondence (§4.3)
    plan.observer.stage("correspondence")
    nearest = correspondences(plan, dift, regions)
    finest = plan.unet.strides[0]
    injection = plan_injection(nearest[finest], masks[finest], plan.config.alpha)

    # Pass 2
    plan.observer.stage("second pass")
    for state in denoise(plan, resume, plan.steps, injection):
        on_step(first + state.step - branch, total)
    return Told(state.x, masks, nearest)


def denoise(plan: Plan, state: State, stop: int, injection: Injection | None = None) -> Iterator[State]:
    """Steps from `state` up to step `stop`, exclusive; yields the state after each."""
    while state.step < stop:
        state = advance(plan, state, injection)
        yield state


def advance(plan: Plan, state: State, injection: Injection | None) -> State:
    """One step. A function of its own, so that its large tensors, vanilla queries above all, end with it."""
    t = plan.timesteps[state.step]
    active = injection if state.step in plan.injection_steps else None
    output, control = guided_output(plan, state, active, call=(1 if injection is None else 2, state.step))
    alpha_bar, alpha_bar_next = plan.alpha_bars[t], ddim.alpha_bar_after(plan.schedule, plan.steps, t)
    x = ddim.step(state.x, output, alpha_bar, alpha_bar_next, plan.schedule.prediction)
    if plan.follow is not None:
        anchors = plan.follow(state.step, state.x[: plan.anchors], output[: plan.anchors])
        x = torch.cat([anchors, x[plan.anchors :]])
    cross_maps = state.cross_maps
    if control.cross_maps:
        history = plan.config.mask_history or plan.steps
        cross_maps = [*cross_maps, average_maps(control.cross_maps)][-history:]
    dift = control.dift if state.step == plan.dift_step else None
    after = State(state.step + 1, x, cross_maps, dift)
    plan.observer.step(plan, state, after, output)
    return after


def guided_output(plan: Plan, state: State, injection: Injection | None, call: Call) -> tuple[Tensor, Consistent]:
    """One consistent call with guidance: the predicted noise (or v) [N, 4, h, w], and the control with its records."""
    x = state.x.repeat(1 + plan.cond.guided, 1, 1, 1).to(plan.cond.pooled.dtype)
    t = plan.timesteps[state.step]
    recorded = plan.recorded.call(call) if plan.recorded else None
    sharing = plan_sharing(plan, state, recorded)
    recorder = plan.recorder.call(call, sharing.key_masks if sharing else {}) if plan.recorder else None
    control = Consistent(
        plan.token_weights, plan.unet.strides[-1], sharing, injection, plan.unet.strides[0], recorded, recorder
    )
    observed = plan.observer.control(plan, state, control)
    residuals = [steering.residuals(x, t) for steering in plan.controls if state.step in steering.steps]
    encoded = add_residuals(plan.unet.encode(x, t, plan.cond, observed), residuals)
    if sharing is not None and sharing.vanilla is not None and not state.vanilla.queries:
        # The vanilla call shares the encoder and the middle with this one, unless injection has changed them.
        plain = encoded
        if injection is not None:
            plain = add_residuals(plan.unet.encode(x, t, plan.cond, AttentionControl()), residuals)
        plan.unet.decode_blocks(plan.unet.attended_blocks, plain, state.vanilla, plan.config.freeu)
    output = plan.unet.decode(encoded, observed, plan.config.freeu).float()
    if not plan.cond.guided:
        return output, control
    unconditional, conditional = output.chunk(2)
    return unconditional + plan.guidance * (conditional - unconditional), control


def plan_sharing(plan: Plan, state: State, recorded: RecordedCall | None) -> Sharing | None:
    """Who reads what at this step. Step 0 has no mask yet and is plain."""
    if not plan.config.sdsa or state.step == 0:
        return None
    if recorded is not None:
        regions, key_masks = {}, recorded.key_masks
    else:
        regions = current_regions(plan, state)
        key_masks = {s: r[: plan.anchors].any(dim=1) & plan.kept_keys[s][state.step] for s, r in regions.items()}
    weight = blend_weight(plan.config, state.step, plan.steps)
    vanilla = None if weight is None else (state.vanilla, weight)
    bits = {s: region_bits(r) for s, r in regions.items()} if plan.config.separate_subjects else {}
    return Sharing(
        key_masks, plan.share, vanilla, {s: (b, b[: plan.anchors]) for s, b in bits.items()}, plan.align_keys
    )


def correspondences(plan: Plan, dift: Tensor, regions: dict[int, Tensor]) -> dict[int, Nearest]:
    """The anchor patches that show what each patch shows, per stride, by features dift [N, C, h, w] (§4.3)."""
    if plan.recorder is not None:
        plan.recorder.subject(dift[: plan.anchors], {s: r[: plan.anchors].any(dim=1) for s, r in regions.items()})
    dift = smooth(at_least_float32(dift))
    if plan.recorded is None:
        return {s: nearest_in_regions(dift, size, regions[s], plan.share) for s, size in plan.sizes.items()}
    anchor_dift, masks = smooth(at_least_float32(plan.recorded.dift)), plan.recorded.masks
    return {s: nearest_patches(dift, size, masks[s], plan.share, anchor_dift) for s, size in plan.sizes.items()}


def blend_weight(config: ConsistoryConfig, step: int, steps: int) -> float | None:
    """v of eq. 4 at a step: linear from `start` at step 0 to `end` at the last blended step, then None."""
    blend = config.query_blend
    last = int(steps * blend.fraction) if blend else -1
    if blend is None or step > last:
        return None
    return blend.start + (blend.end - blend.start) * (step / last if last else 0.0)


def current_regions(plan: Plan, state: State) -> dict[int, Tensor]:
    """{stride: bool [N, R, P]}: R = 1, the subject mask from the steps so far (eq. 7); all patches if masking is off.

    If subjects are separate, R = K: the mask of each concept.
    """
    if not plan.config.masking:
        n, device = len(state.x), state.x.device
        return {s: torch.ones(n, 1, h * w, dtype=torch.bool, device=device) for s, (h, w) in plan.sizes.items()}
    maps, size = average_maps(state.cross_maps), plan.sizes[plan.unet.strides[-1]]
    if plan.config.separate_subjects:
        return concept_masks(maps, size, plan.sizes)
    return {s: mask[:, None] for s, mask in subject_masks(maps, size, plan.sizes).items()}
