"""CLIP against transformers: vectors of texts and pictures, from the same folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import VOCABULARY
from parity import randomise, relative_error

from consistory import ConsistoryError
from consistory.clip import CLIP, Preprocessor

TOLERANCE = 1e-5
TEXTS = ["a photo of a cat", "a dog, asleep on the beach by night!", "", "very " * 100]
SIZES = [(64, 64), (100, 150), (301, 200), (32, 33), (40, 300)]

TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 48,
    "patch_size": 16,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "openai": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 20},
    "laion": {
        "text_config": {**TEXT, "hidden_act": "gelu"},
        "vision_config": {**VISION, "hidden_act": "gelu", "patch_size": 14, "image_size": 56, "layer_norm_eps": 1e-2},
        "projection_dim": 28,
    },
}


def processor() -> type[Any]:
    """The one that needs Pillow only. transformers 5 calls it so; before, the plain name was this one."""
    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def save(folder: Path, config: dict[str, Any]) -> Any:
    model = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
    randomise(model)
    model.save_pretrained(folder)
    size = config["vision_config"]["image_size"]
    processor()(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(VOCABULARY / name, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    return model


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIP, Any, Path]:
    folder = tmp_path_factory.mktemp("clip")
    oracle = save(folder, request.param)
    return CLIP.from_pretrained(folder), oracle, folder


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


@torch.no_grad()
def test_vectors_equal_transformers(pair: tuple[CLIP, Any, Path]) -> None:
    clip, oracle, folder = pair
    pixels = processor().from_pretrained(folder)(pictures(), return_tensors="pt")["pixel_values"]
    ids = clip.tokenizer.encode(TEXTS, warn=False)
    expected = oracle(input_ids=ids, pixel_values=pixels.float())
    images, texts = clip.embed_images(pictures()), clip.embed_texts(TEXTS)
    assert relative_error(images, expected.image_embeds) <= TOLERANCE
    assert relative_error(texts, expected.text_embeds) <= TOLERANCE
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(len(SIZES)))


@pytest.mark.parametrize("size, crop", [(48, (48, 48)), (40, (32, 24)), (57, (57, 57))], ids=str)
def test_pictures_are_prepared_as_transformers_does(size: int, crop: tuple[int, int]) -> None:
    settings = {"size": {"shortest_edge": size}, "crop_size": {"height": crop[0], "width": crop[1]}}
    oracle, prepare = processor()(**settings), Preprocessor.from_json(settings, 224)
    for picture in pictures():
        (expected,) = oracle(picture, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(prepare(picture), expected.float(), atol=1e-5, rtol=0)


def test_settings_of_the_first_published_folders() -> None:
    """There, numbers stand for sizes; and without a file, CLIP's own values hold."""
    assert Preprocessor.from_json({"size": 224, "crop_size": 224}, 99) == Preprocessor(224, (224, 224))
    assert Preprocessor.from_json({}, 336) == Preprocessor(336, (336, 336))


def test_a_config_may_leave_out_what_is_usual(tmp_path: Path) -> None:
    """Such as older folders of ViT-B/32: here, everything but the number of layers."""
    config = {"text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 1, "image_size": 224}}
    oracle = save(tmp_path, config)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored |= config
    del stored["projection_dim"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    clip = CLIP.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = oracle.vision_model(torch.ones(1, 3, 224, 224)).pooler_output
        actual = clip.images.vision(torch.ones(1, 3, 224, 224))
    assert relative_error(actual, oracle.visual_projection(expected)) <= TOLERANCE


def test_another_model_is_refused(tmp_path: Path, golden_weights: Path) -> None:
    with pytest.raises(ConsistoryError, match=r"holds no CLIP model \(clip_text_model\).*such as"):
        CLIP.from_pretrained(golden_weights / "text_encoder")
    with pytest.raises(ConsistoryError, match="is missing"):
        CLIP.from_pretrained(tmp_path)
