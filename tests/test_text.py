from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import randomise, recorded_module, relative_error
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from consistory.config import TextConfig
from consistory.text import TextEncoder

TOLERANCE = 1e-5
VOCABULARY = 60
START, END = VOCABULARY - 2, VOCABULARY - 1


def config_json(model: str, **others: Any) -> dict[str, Any]:
    config = {
        "architectures": [model],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 77,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "hidden_act": "quick_gelu",
        "projection_dim": 32,
        "layer_norm_eps": 1e-5,
        "bos_token_id": START,
        "eos_token_id": 2,  # what SDXL's own configs say; transformers then looks for the highest id
    }
    return config | others


CONFIGS = {
    "vit-l-in-small": config_json("CLIPTextModel"),
    "vit-g-in-small": config_json(
        "CLIPTextModelWithProjection", hidden_act="gelu", hidden_size=48, num_attention_heads=3, num_hidden_layers=4,
        projection_dim=40,
    ),
    "true-end-id": config_json(
        "CLIPTextModelWithProjection", eos_token_id=END, projection_dim=24, num_attention_heads=4
    ),
    "one-layer-loose-norm": config_json(
        "CLIPTextModel", num_hidden_layers=1, hidden_act="gelu", hidden_size=20, intermediate_size=30,
        layer_norm_eps=1e-2,
    ),
}
MODELS = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
PREFIX = "text_model."


def build(config: dict[str, Any], gain: float = 1.0) -> tuple[TextEncoder, Any]:
    """Ours and transformers', with the same random weights."""
    oracle = MODELS[config["architectures"][0]](CLIPTextConfig(**config)).eval()
    randomise(oracle, gain=gain)
    encoder = TextEncoder(TextConfig.from_json(config)).eval()
    # transformers 5 drops the prefix of a CLIPTextModel that published checkpoints have.
    named = {k if k.startswith((PREFIX, "text_projection.")) else PREFIX + k: x for k, x in oracle.state_dict().items()}
    encoder.load_state_dict({k: x for k, x in named.items() if not k.endswith("position_ids")})
    return encoder, oracle


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def pair(request: pytest.FixtureRequest) -> tuple[TextEncoder, Any]:
    return build(request.param)


def prompts(length: int = 77) -> Tensor:
    """Random ids: no token at all; a few, padded with the end or with id 0; as many as fit; an end before the end."""
    ids = torch.randint(0, START, (5, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = START
    ids[0, 1:] = END
    ids[1, 5:] = END
    ids[2, 9], ids[2, 10:] = END, 0
    ids[3, -1] = END
    ids[4, 3], ids[4, 12:] = END, END
    return ids


def assert_equal(encoder: TextEncoder, oracle: Any, ids: Tensor) -> None:
    penultimate, pooled = encoder(ids)
    expected = oracle(ids, output_hidden_states=True)
    assert relative_error(penultimate, expected.hidden_states[-2]) <= TOLERANCE
    projects = isinstance(oracle, CLIPTextModelWithProjection)
    assert relative_error(pooled, expected.text_embeds if projects else expected.pooler_output) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("length", [77, 13])
def test_equals_transformers(pair: tuple[TextEncoder, Any], length: int) -> None:
    encoder, oracle = pair
    assert_equal(encoder, oracle, prompts(length))


@torch.no_grad()
def test_skipping_layers_equals_transformers(pair: tuple[TextEncoder, Any]) -> None:
    encoder, oracle = pair
    states = oracle(prompts(), output_hidden_states=True).hidden_states
    _, pooled = encoder(prompts())
    for clip_skip in range(encoder.config.layers):
        state, same = encoder(prompts(), clip_skip)
        assert relative_error(state, states[-2 - clip_skip]) <= TOLERANCE
        assert torch.equal(same, pooled)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers_on_faint_activations(name: str) -> None:
    """Where the epsilon of every norm counts."""
    encoder, oracle = build(CONFIGS[name], gain=0.03)
    assert_equal(encoder, oracle, prompts())


@torch.no_grad()
def test_pooled_depends_on_what_comes_before_the_first_end_only(pair: tuple[TextEncoder, Any]) -> None:
    encoder, _ = pair
    ids = prompts()
    _, pooled = encoder(ids)
    after, before = ids.clone(), ids.clone()
    after[4, 4] = (ids[4, 4] + 1) % START
    before[4, 2] = (ids[4, 2] + 1) % START
    assert relative_error(encoder(after)[1][4], pooled[4]) <= TOLERANCE
    assert relative_error(encoder(before)[1][4], pooled[4]) > 0.01


@torch.no_grad()
def test_a_token_changes_its_own_and_later_states_only() -> None:
    encoder, _ = build(CONFIGS["vit-g-in-small"])
    ids = prompts()
    changed = ids.clone()
    changed[3, 20] = (ids[3, 20] + 1) % START
    difference = (encoder(changed)[0] - encoder(ids)[0]).abs().amax(dim=-1)
    assert difference[3, :20].max() <= 1e-5
    assert difference[3, 20:].min() > 1e-4
    assert difference[:3].max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("index, folder", [(1, "text_encoder"), (2, "text_encoder_2")])
def test_equals_the_recorded_encoders(golden: Any, golden_weights: Path, index: int, folder: str) -> None:
    units, _ = golden("model_units")
    encoder = recorded_module(TextEncoder, TextConfig, golden_weights / folder)
    penultimate, pooled = encoder(units[f"text{index}/input_ids"])
    assert relative_error(penultimate, units[f"text{index}/penultimate"]) <= TOLERANCE
    assert relative_error(pooled, units[f"text{index}/pooled"]) <= TOLERANCE
