import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from consistory.tokenizer import CLIP_VOCABULARY, END, START, Tokenizer
from consistory.weights.errors import ConsistoryError

PADS = {"tokenizer": END, "tokenizer_2": "!"}
WORDS = ["cat", "Robot", "it's", "naïve", "1st", "3.14", "hello...", "(yes)", "🐶🎩", "a_b", "wow!!!", "we'LL", "Ω≈ç"]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


@pytest.fixture(scope="module")
def recorded(golden_folder: Path) -> dict[str, Any]:
    return json.loads((golden_folder / "units" / "tokenizer.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of CLIP's format: 512 byte symbols, a few merges, the special tokens last."""
    folder = tmp_path_factory.mktemp("small")
    symbols = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("o", "n</w>")]
    tokens = symbols + [f"{symbol}</w>" for symbol in symbols] + ["".join(merge) for merge in merges] + [START, END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n", "utf-8")
    settings = {"pad_token": END, "bos_token": START, "eos_token": END, "unk_token": END, "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "CLIPTokenizer"}), "utf-8")
    return folder


def random_prompts(count: int) -> list[str]:
    draw = random.Random(0)
    separators = [" ", "  ", "\n", "", ", ", "-"]
    return [
        "".join(draw.choice(WORDS) + draw.choice(separators) for _ in range(draw.randrange(40))) for _ in range(count)
    ]


@pytest.mark.parametrize(("name", "key"), [("tokenizer", "tokenizer1_77"), ("tokenizer_2", "tokenizer2_77")])
def test_ids_equal_the_recorded_ones(name: str, key: str, golden_weights: Path, recorded: dict[str, Any]) -> None:
    for tokenizer in (Tokenizer.from_folder(golden_weights / name), Tokenizer.clip(PADS[name])):
        ids = tokenizer.encode(recorded["prompts"])
        assert ids.dtype == torch.int64
        assert ids.tolist() == recorded[key]


@pytest.mark.parametrize("name", PADS)
def test_ids_equal_those_of_transformers(name: str, golden_weights: Path) -> None:
    oracle = transformers.CLIPTokenizer.from_pretrained(golden_weights / name)
    prompts = random_prompts(200)
    expected = oracle(prompts, padding="max_length", truncation=True)["input_ids"]
    assert Tokenizer.from_folder(golden_weights / name).encode(prompts).tolist() == expected


def test_a_small_vocabulary_of_the_same_format(small_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(small_folder)
    oracle = transformers.CLIPTokenizer.from_pretrained(small_folder)
    prompts = ["a cat on a dog", "Catdog, cats!", "", *random_prompts(20)]
    assert tokenizer.encode(prompts).tolist() == oracle(prompts, padding="max_length", truncation=True)["input_ids"]
    vocabulary = json.loads((small_folder / "vocab.json").read_text("utf-8"))
    assert tokenizer.encode(["cat"])[0, :4].tolist() == [vocabulary[token] for token in (START, "cat</w>", END, END)]
    assert tokenizer.end == len(vocabulary) - 1


@pytest.mark.parametrize("name", PADS)
def test_a_folder_with_tokenizer_json_only(name: str, golden_weights: Path, tmp_path: Path) -> None:
    """What transformers saves since version 5."""
    transformers.CLIPTokenizerFast.from_pretrained(golden_weights / name).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink(missing_ok=True)
    prompts = random_prompts(5)
    assert Tokenizer.from_folder(tmp_path).encode(prompts).equal(Tokenizer.clip(PADS[name]).encode(prompts))


def test_length_comes_from_the_folder(small_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(small_folder, tmp_path, dirs_exist_ok=True)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text("utf-8").replace("77", "9"), "utf-8")
    assert Tokenizer.from_folder(tmp_path).encode(["a dog", "dog " * 20]).shape == (2, 9)


def test_truncation_is_logged_with_what_is_lost(clip: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    fits, long = "dog " * 75, "dog " * 75 + "under a Red Tree"
    assert clip.encode([fits])[0, -1] == clip.end
    assert not caplog.records
    ids = clip.encode([long])
    assert ids.equal(clip.encode([fits]))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "77 tokens" in record.getMessage() and "'under a Red Tree'" in record.getMessage()
    clip.encode([long], warn=False)
    assert len(caplog.records) == 1


def test_concepts_where_the_reference_run_found_them(clip: Tokenizer, recorded: dict[str, Any]) -> None:
    """Recorded: the last place of the first piece. Ours agrees wherever a concept of one piece occurs once."""
    compared = 0
    for case in recorded["token_indices"]:
        for concept, places in zip(case["concept"], case["indices"], strict=True):
            for prompt, place in zip(case["prompts"], places, strict=True):
                if concept in ("dog", "cat", "hat", "robot") and prompt.split().count(concept) == 1:
                    assert clip.concept_positions([prompt], concept)[0].equal(torch.eye(77)[place])
                    compared += 1
    assert compared >= 10


@pytest.mark.parametrize(
    ("prompt", "concept", "places"),
    [
        ("a Cat, sleeping", "cat", [2]),
        ("the cat's hat", "CAT", [2]),
        ("a cat and a cat", "cat", [2, 5]),
        ("cats and a cat", "cat", [4]),
        ("an alleycat and a cat", "cat", [6]),  # "alley" + "cat"
        ("a corgi puppy on a corgi", "corgi puppy", [2, 3]),
        ("an axolotl", "axolotl", [2, 3, 4, 5]),  # "ax" + "o" + "lot" + "l"
        ("🐶 is a dog", "🐶", [1]),
        ("a cat" + " dog" * 80 + " cat", "cat", [2]),
    ],
)
def test_concept_positions(clip: Tokenizer, prompt: str, concept: str, places: list[int]) -> None:
    weights = clip.concept_positions(["a " + concept, prompt], concept)
    assert weights.shape == (2, 77) and weights.dtype == torch.float32
    expected = torch.zeros(77)
    expected[places] = 1 / len(places)
    torch.testing.assert_close(weights[1], expected)


def test_concept_positions_are_places_in_the_ids(clip: Tokenizer) -> None:
    (ids,), (weights,) = clip.encode(["an axolotl naps"]), clip.concept_positions(["an axolotl naps"], "axolotl")
    (alone,) = clip.encode(["axolotl"])
    assert ids[weights > 0].equal(alone[1:5])


@pytest.mark.parametrize(
    ("prompt", "concept", "says"),
    [
        ("a caterpillar", "cat", "'cat' is not in the prompt 'a caterpillar'"),
        ("an alleycat", "cat", "'cat' is not in"),
        ("a cat\nand cats", "cat dog", r"'cat dog' is not in the prompt 'a cat\nand cats'"),
        ("dog " * 75 + "cat", "cat", "only after its first 77 tokens"),
        ("dog " * 74 + "corgi puppy", "corgi puppy", "only after its first 77 tokens"),
        ("a cat", "  ", "'  ' is empty"),
    ],
)
def test_a_concept_that_is_not_there(clip: Tokenizer, prompt: str, concept: str, says: str) -> None:
    with pytest.raises(ConsistoryError) as error:
        clip.concept_positions([concept, prompt], concept)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_vocabulary(small_folder: Path, tmp_path: Path) -> None:
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copytree(small_folder, tmp_path / file)
        (tmp_path / file / file).unlink()
        with pytest.raises(ConsistoryError, match=f"{file}.*download"):
            Tokenizer.from_folder(tmp_path / file)


@pytest.mark.parametrize(
    "name, content",
    [
        ("merges.txt", b"#version: 0.2\nc a\nca"),
        ("merges.txt", b"\xff\xfec a"),
        ("tokenizer.json", b'{"version": "1.0"}'),
        ("tokenizer.json", b'{"model": {"vocab": {}, "merges": [["c"]]}}'),
        ("tokenizer.json", b'{"model": {"vocab": {}, "merges": 5}}'),
    ],
)
def test_a_damaged_vocabulary(name: str, content: bytes, small_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(small_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content)
    if name == "tokenizer.json":
        (tmp_path / "vocab.json").unlink()
    with pytest.raises(ConsistoryError, match=f"cannot read .*{name}.*download it again") as error:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_merges_may_be_single_strings(small_folder: Path, tmp_path: Path) -> None:
    """As in a `tokenizer.json` of transformers before 4.45."""
    vocabulary = json.loads((small_folder / "vocab.json").read_text("utf-8"))
    merges = (small_folder / "merges.txt").read_text("utf-8").splitlines()[1:]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary, "merges": merges}}), "utf-8")
    shutil.copy(small_folder / "tokenizer_config.json", tmp_path)
    prompts = ["a cat on a dog", "dog"]
    assert Tokenizer.from_folder(tmp_path).encode(prompts).equal(Tokenizer.from_folder(small_folder).encode(prompts))


def test_a_vocabulary_that_is_not_clips(small_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(small_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "vocab.json").write_text('{"<s>": 0, "</s>": 1}')
    with pytest.raises(ConsistoryError, match=r"is not a CLIP tokenizer \(no <\|startoftext\|>"):
        Tokenizer.from_folder(tmp_path)


def test_the_vocabulary_keeps_its_notice() -> None:
    assert "MIT License" in (CLIP_VOCABULARY / "LICENSE").read_text("utf-8")
