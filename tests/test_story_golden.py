"""The whole method against recorded runs of the authors' implementation (see golden/README.md for the recordings)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from consistory import ConsiStory, ConsistoryConfig, FreeU, Story, story

RESOLUTION = {2: 64, 4: 32}  # latent stride -> patches per side in the names of recorded tensors

CASES = [
    "case1b_batch_n19",
    "case5_no_share_queries_n19",
    pytest.param("case1_batch", marks=pytest.mark.golden),
    pytest.param("case2_freeu_multi", marks=pytest.mark.golden),
    pytest.param("case4_dropout", marks=pytest.mark.golden),
    pytest.param("case5_no_injection", marks=pytest.mark.golden),
    pytest.param("case5_vanilla", marks=pytest.mark.golden),
]


def config_of(case: dict[str, Any]) -> ConsistoryConfig:
    reference = ConsistoryConfig.reference()
    return replace(
        reference,
        sdsa=case["perform_sdsa"],
        injection=case["perform_injection"],
        query_blend=reference.query_blend if case["share_queries"] else None,
        dropout=case["mask_dropout"],
        freeu=FreeU(**case["freeu"]) if case["freeu"] else None,
    )


def tell(pipe: ConsiStory, tensors: dict[str, Tensor], case: dict[str, Any], **others: Any) -> Story:
    return pipe(
        prompts=case["prompts"], concepts=case["concept_token"], steps=case["n_steps"], anchors=case["n_anchors"],
        guidance=case["guidance_scale"], latents=tensors["init_latents"], config=config_of(case), **others,
    )  # fmt: skip


def replay_dropout(monkeypatch: pytest.MonkeyPatch, tensors: dict[str, Tensor]) -> None:
    """Recorded draws in place of our own. The recording drew after a step for the next; ours belong to their step."""

    def recorded(seed: int, stride: int, steps: int, anchors: int, patches: int, p: float) -> Tensor:
        kept = ~tensors[f"dropout_rand{RESOLUTION[stride]}"][:, :anchors]
        return kept.roll(1, dims=0)

    monkeypatch.setattr(story, "draw_dropout", recorded)


@pytest.mark.parametrize("name", CASES)
def test_recorded_run(golden, golden_weights, monkeypatch, name):
    tensors, case = golden(name)
    if name == "case5_no_injection":  # recorded as the first pass of another case
        tensors = golden("case1_batch")[0] | tensors
    if case["mask_dropout"]:
        replay_dropout(monkeypatch, tensors)
    told = tell(ConsiStory.from_pretrained(golden_weights, dtype=torch.float64), tensors, case)

    last_pass = "pass2" if case["perform_injection"] else "pass1"
    torch.testing.assert_close(told.latents, tensors[f"{last_pass}/latents_final"], atol=2e-4, rtol=0)
    if f"{last_pass}/image_crop" in tensors:
        crop = torch.from_numpy(told.images[:, 448:576, 448:576]).int()
        assert (crop - tensors[f"{last_pass}/image_crop"].int()).abs().max() <= 1
    if not case["perform_injection"]:
        return
    for stride, resolution in RESOLUTION.items():
        recorded_mask = tensors[f"pass1/mask{resolution}_step{case['n_steps'] - 1:02d}"]
        assert (told.masks[stride] != recorded_mask).sum() <= 4
        if f"nn/nn_map{resolution}" not in tensors:
            continue
        index = tensors[f"nn/nn_map{resolution}"][:, : case["n_anchors"]].long()
        distance = tensors[f"nn/nn_dist{resolution}"][:, : case["n_anchors"]]
        nearest, other = told.nearest[stride], index >= 0
        torch.testing.assert_close(nearest.distance, distance, atol=1e-5, rtol=0)
        assert (nearest.index != index)[other].float().mean() < 1e-3  # ties may go either way


@pytest.mark.golden
@pytest.mark.parametrize("grade", ["together", "recorded"])
def test_recorded_extra(golden, golden_weights, tmp_path, grade):
    """A picture that joined cached anchors in the recording: in one story with them, and joining ours on disk."""
    tensors, case = golden("case3_cached")
    pipe = ConsiStory.from_pretrained(golden_weights, dtype=torch.float64)
    anchors, extra = tensors["anchor/init_latents"], tensors["extra0/init_latents"]
    prompts, more = case["prompts"], case["extra_prompts"]
    if grade == "together":
        latents = tell(pipe, {"init_latents": torch.cat([anchors, extra])}, case | {"prompts": prompts + more}).latents
    else:
        story = tell(pipe, {"init_latents": anchors}, case, record=tmp_path / "anchors.safetensors")
        joined = story.subject.extend(prompts=more, latents=extra)
        latents = torch.cat([story.latents, joined.latents])
    recorded = torch.cat([tensors[f"{part}/pass2/latents_final"] for part in ("anchor", "extra0")])
    torch.testing.assert_close(latents, recorded, atol=2e-4, rtol=0)
