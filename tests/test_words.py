"""Learned words lead to the states that diffusers' textual inversions lead to; prompts and subjects know them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from parity import relative_error
from safetensors.torch import save_file
from torch import Tensor

from consistory import ConsiStory, ConsistoryError
from consistory.cli import main
from consistory.subject import Subject
from consistory.tokenizer import Tokenizer
from consistory.words import Word

TOLERANCE = 1e-5
SMALL: dict[str, Any] = {"steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipe(golden_weights: Path) -> ConsiStory:
    return ConsiStory.from_pretrained(golden_weights)


def embeddings(pipe: ConsiStory, count: int, seed: int = 0) -> dict[str, Tensor]:
    """As large as the model's own."""
    generator = torch.Generator().manual_seed(seed)
    tables = [encoder.text_model.embeddings.token_embedding.weight.float() for encoder in pipe.text_encoders]
    drawn = [table.std() * torch.randn(count, table.shape[1], generator=generator) for table in tables]
    return dict(zip(("clip_l", "clip_g"), drawn, strict=True))


def word(pipe: ConsiStory, path: Path, count: int = 2, seed: int = 0, **options: Any) -> Word:
    save_file(embeddings(pipe, count, seed), path)
    return Word.load(path, **options)


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(golden_weights: Path) -> StableDiffusionXLPipeline:
    """Where it knows the end of a text by the true id: by the highest one, it would take a learned word for it."""
    oracle = StableDiffusionXLPipeline.from_pretrained(golden_weights, add_watermarker=False)
    for encoder, tokenizer in (
        (oracle.text_encoder, oracle.tokenizer), (oracle.text_encoder_2, oracle.tokenizer_2),
    ):  # fmt: skip
        for module in encoder.modules():
            if hasattr(module, "eos_token_id"):
                module.eos_token_id = tokenizer.eos_token_id
    return oracle


@pytest.mark.parametrize("count", [1, 3])
def test_states_are_those_of_diffusers(
    count: int, pipe: ConsiStory, oracle: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    name = f"<my-dog-{count}>"
    learned = embeddings(pipe, count)
    prompts = [f"a photo of a {name} on the beach", f"{name}, {name} and a dog", "a dog in the snow", f"a dog,{name}."]
    oracle.load_textual_inversion(learned["clip_l"], name, text_encoder=oracle.text_encoder, tokenizer=oracle.tokenizer)
    oracle.load_textual_inversion(
        learned["clip_g"], name, text_encoder=oracle.text_encoder_2, tokenizer=oracle.tokenizer_2
    )
    save_file(learned, tmp_path / "x.safetensors")
    other = word(pipe, tmp_path / "y.safetensors", seed=9)  # takes the first ids
    ours = pipe.with_word(other).with_word(Word.load(tmp_path / "x.safetensors", name))
    expected, _, pooled, _ = oracle.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    for actual, wanted in zip(ours.encode_prompts(prompts), (expected, pooled), strict=True):
        assert relative_error(actual, wanted) <= TOLERANCE


def test_the_model_itself_does_not_change(pipe: ConsiStory, tmp_path: Path) -> None:
    before = pipe.encode_prompts(["a dog x"])
    changed = pipe.with_word(word(pipe, tmp_path / "x.safetensors")).encode_prompts(["a dog x"])
    for one, other, after in zip(before, changed, pipe.encode_prompts(["a dog x"]), strict=True):
        assert torch.equal(one, after) and not torch.equal(one, other)


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return Tokenizer.clip()


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode([text])[0, 1:].tolist()[: text.count(" ") + 6]


def test_a_word_stands_by_itself_in_any_case(plain: Tokenizer) -> None:
    learned = plain.with_word("Art", 2)
    (a,), (cat,), (end,) = (plain.encode([text])[0, 1:2].tolist() for text in ("a", "cat", ""))
    for text in ("a art cat", "a ART cat", "a  aRt\ncat"):
        assert ids(learned, text)[:5] == [a, -1, -2, cat, end]
    for text in ("artist", "smart", "art_", "art1"):
        assert ids(learned, text) == ids(plain, text)
    comma, possessive = (plain.encode([text])[0, 1].item() for text in (",", "'s"))
    assert ids(learned, "art,art's")[:6] == [-1, -2, comma, -1, -2, possessive]


def test_words_that_begin_alike(plain: Tokenizer) -> None:
    learned = plain.with_word("<s0>", 1).with_word("<s0><s1>", 2).with_word("my dog", 1)
    assert ids(learned, "<s0><s1>")[:2] == [-2, -3] and ids(learned, "<s0> <s1>")[0] == -1
    assert ids(learned, "My dog")[0] == -4
    assert ids(plain, "<s0>") != ids(learned, "<s0>") and plain.learned == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [("istyle", "ıstyle"), ("sks", "ſks"), ("µstyle", "μstyle"), ("İstyle", "İstyle"), ("cafe\u0301", "café"),
     ("café", "CAFE\u0301"), ("my word", "my \n word")],
    ids=ascii,
)  # fmt: skip
def test_a_word_in_other_letters(name: str, text: str, plain: Tokenizer) -> None:
    """What Python takes for the same letter, in one case or the other, composed or not; and any white space."""
    assert ids(plain.with_word(name, 1), text)[0] == -1


def test_two_words_of_one_name(pipe: ConsiStory, tmp_path: Path) -> None:
    once = pipe.with_word(word(pipe, tmp_path / "x.safetensors"))
    with pytest.raises(ConsistoryError, match="two words 'X': give one of them another name"):
        once.with_word(word(pipe, tmp_path / "y.safetensors", name="X"))


def test_a_word_can_be_the_concept(plain: Tokenizer) -> None:
    learned = plain.with_word("mydog", 3)
    (weights,) = learned.concept_positions(["a mydog, my dog and a mydog"], "MyDog")
    places = [2, 3, 4, 10, 11, 12]  # start, a, three of the word, a comma, my, dog, and, a, three of the word
    assert weights.nonzero().flatten().tolist() == places and weights.sum() == pytest.approx(1)
    with pytest.raises(ConsistoryError, match="'mydog' is not in the prompt"):
        learned.concept_positions(["a dog"], "mydog")


def test_what_does_not_fit_is_told(plain: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    row = plain.with_word("mydog", 70).encode(["a big mydog on the old white beach"])[0]
    assert row[3:73].tolist() == [-1 - i for i in range(70)]
    assert "this part is ignored: 'white beach'" in caplog.text


# --- stories ----------------------------------------------------------------------------------------------------------


def test_a_story_of_a_learned_subject(pipe: ConsiStory, tmp_path: Path) -> None:
    """Its record has the word, and its subject needs it; the file's place does not matter."""
    learned = pipe.with_word(word(pipe, tmp_path / "mydog.safetensors"))
    story = learned(subject="a mydog", settings=["on the beach", "in the snow"], **SMALL)
    assert story.concepts == ["mydog"]
    assert story.settings["words"] == [[str(tmp_path / "mydog.safetensors"), "mydog"]]
    story.subject.save(tmp_path / "kept.safetensors")
    shutil.copy(tmp_path / "mydog.safetensors", tmp_path / "moved.safetensors")
    again = pipe.with_word(Word.load(tmp_path / "moved.safetensors", "mydog"))
    assert Subject.load(tmp_path / "kept.safetensors", again).extend(["at home"]).prompts == ["a mydog at home"]
    other = pipe.with_word(word(pipe, tmp_path / "other.safetensors", seed=1, name="mydog"))
    for wrong in (pipe, other):
        assert wrong.fingerprint != learned.fingerprint
        with pytest.raises(ConsistoryError, match="other LoRAs, learned words or another picture prompt"):
            Subject.load(tmp_path / "kept.safetensors", wrong)


def test_dtypes_and_offloading(golden_weights: Path, tmp_path: Path) -> None:
    pipe = ConsiStory.from_pretrained(golden_weights, dtype=torch.bfloat16, offload=True)
    learned = pipe.with_word(word(pipe, tmp_path / "x.safetensors"))
    context, pooled = learned.encode_prompts(["a x"])
    assert context.dtype == pooled.dtype == torch.bfloat16 and context.isfinite().all()


def test_the_command(
    golden_weights: Path, pipe: ConsiStory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bad", "mydog"):
        save_file(embeddings(pipe, 2), tmp_path / f"{name}.safetensors")
    out = tmp_path / "out"
    line = ["a <my:dog>", "--settings", "in space", "in snow", "--concept", "<my:dog>", "--negative", "bad", "--quiet"]
    line += ["--model", str(golden_weights), "--steps", "1", "--width", "64", "--height", "64", "--out", str(out)]
    files = [str(tmp_path / "bad.safetensors"), f"{tmp_path / 'mydog.safetensors'}:<my:dog>"]
    assert main([*line, "--embedding", files[0], "--embedding", files[1]]) == 0
    assert "warning" not in capsys.readouterr().err
    record = json.loads((out / "story.json").read_text())
    assert record["words"] == [[files[0], "bad"], [files[1].removesuffix(":<my:dog>"), "<my:dog>"]]
    assert main([*line, "--embedding", files[0], "--embedding", f"{files[0]}:other"]) == 0
    assert "warning: no prompt has the word 'other' of --embedding" in capsys.readouterr().err
    assert main([*line, "--embedding", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors: check the name" in capsys.readouterr().err


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda x: {"emb_params": x["clip_l"]}, "not an SDXL embedding, which would hold clip_l and clip_g"),
        (lambda x: {"clip_l": x["clip_l"]}, "it holds clip_l"),
        (lambda x: {**x, "clip_g": x["clip_g"][:1]}, "not the same number of vectors"),
        (lambda x: {**x, "clip_l": x["clip_l"][0]}, "not the same number of vectors"),
        (lambda x: {key: tensor[:0] for key, tensor in x.items()}, "not the same number of vectors"),
        (lambda x: {**x, "clip_g": x["clip_g"] / 0}, "holds NaN or infinity"),
    ],
    ids=["Stable Diffusion 1", "one encoder", "numbers", "a vector", "empty", "infinity"],
)
def test_files_that_hold_no_word(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str, pipe: ConsiStory, tmp_path: Path
) -> None:
    save_file({key: x.contiguous() for key, x in change(embeddings(pipe, 2)).items()}, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError, match=says) as error:
        Word.load(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_word_without_a_name(pipe: ConsiStory, tmp_path: Path) -> None:
    for name in (" ", 5):
        with pytest.raises(ConsistoryError, match=f"has the name {name!r}: give one that prompts can write"):
            word(pipe, tmp_path / "x.safetensors", name=name)


@pytest.mark.parametrize("keys", ["text_encoders_{}", "bundle_emb.<my.dog>.clip_{}"])
def test_other_layouts(keys: str, pipe: ConsiStory, tmp_path: Path) -> None:
    """Of diffusers' trainer, and beside a LoRA."""
    learned = embeddings(pipe, 2)
    numbers = ("0", "1") if "encoders" in keys else ("l", "g")
    state = {keys.format(number): x for number, x in zip(numbers, learned.values(), strict=True)}
    save_file(state | {"lora_unet_conv_in.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    found = Word.load(tmp_path / "x.safetensors", "<my.dog>")
    assert all(torch.equal(one, other) for one, other in zip(found.vectors, learned.values(), strict=True))
    if "bundle" in keys:
        with pytest.raises(ConsistoryError, match=r"bundle_emb.<my.dog>.clip_l.*of several words in it, name one"):
            Word.load(tmp_path / "x.safetensors")


def test_a_word_of_another_model(pipe: ConsiStory, tmp_path: Path) -> None:
    save_file({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, tmp_path / "x.safetensors")
    with pytest.raises(ConsistoryError, match=r"x\.safetensors was made for another model \(widths \[768, 1280\]"):
        pipe.with_word(Word.load(tmp_path / "x.safetensors"))
