"""The sprites model's tokenizer: CLIP's byte-level byte-pair encoding, trained on the words of the captions.

Every word of a caption is one token. Text of any other kind falls back to shorter pieces, at worst to single bytes.
Sources: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016, algorithm 1;
Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, section 2.4 (CLIP's).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from consistory.weights.sprites.world import COLOUR_NAMES, PHRASINGS, SETTINGS, SUBJECTS

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
LENGTH = 77

# Not in the captions, but likely in a prompt.
EXTRA_WORDS = """
    animal background ball bed behind big book bright colorful cute dark day dog eating evening fire food for from front
    garden happy hat her his holding house illustration image is it its lake light little looking many moon morning
    mountain near next old one painting park playing portrait rain reading river road room running sad scarf sitting
    sketch sky sleeping small some spotted standing star stars street striped style summer sun sunny that their this
    three tree trees two water watercolor wearing winter with without young
"""

Symbols = tuple[str, ...]
Pair = tuple[str, str]


def build_tokenizer(folder: Path, pad: str = END) -> None:
    """Write `vocab.json`, `merges.txt`, `tokenizer_config.json` and `special_tokens_map.json` into the folder.

    Ids: 256 bytes in CLIP's order ("!" is 0), the same at a word's end, the merges, START and END.

    Args:
        folder: made if missing.
        pad: the padding token; SDXL's first tokenizer pads with END, its second with "!".
    """
    merges = learn_merges(caption_words() | set(EXTRA_WORDS.split()))
    symbols = byte_symbols()
    finals = [symbol + WORD_END for symbol in symbols]
    tokens = [*symbols, *finals, *(left + right for left, right in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}

    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = {"bos_token": _marker(START), "eos_token": _marker(END), "pad_token": pad, "unk_token": _marker(END)}
    _write_json(folder / "special_tokens_map.json", special)
    added = {vocabulary[token]: _marker(token) | {"special": True} for token in (START, END)}
    if pad not in (START, END):
        added[vocabulary[pad]] = _marker(pad) | {"normalized": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(index): added[index] for index in sorted(added)},
        "bos_token": START,
        "clean_up_tokenization_spaces": True,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": LENGTH,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": END,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def caption_words() -> set[str]:
    """Every word that `world.captions` can write."""
    templates = [phrasing.format(a="a", bare="", setting="") for phrasing in PHRASINGS]
    text = " ".join([*templates, *SUBJECTS, *SETTINGS, *COLOUR_NAMES, "an", "and"])
    return set(re.findall(r"[a-z]+", text))


def learn_merges(words: Iterable[str]) -> list[Pair]:
    """Merge the most frequent pair of neighbours until every word is one symbol; ties go to the first by name.

    Applying the merges in this order to one of the words repeats its history here, so it becomes one token.
    """
    segmented: list[Symbols] = [(*word[:-1], word[-1] + WORD_END) for word in words]
    merges: list[Pair] = []
    while True:
        counts = Counter(pair for symbols in segmented for pair in pairwise(symbols))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        segmented = [_merge(symbols, best) for symbols in segmented]


def byte_symbols() -> list[str]:
    """One printable character per byte, in CLIP's order: the bytes that are printable Latin-1, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + offset) for offset in range(others)]


def _merge(symbols: Symbols, pair: Pair) -> Symbols:
    merged: list[str] = []
    position = 0
    while position < len(symbols):
        width = 2 if symbols[position : position + 2] == pair else 1
        merged.append("".join(symbols[position : position + width]))
        position += width
    return tuple(merged)


def _marker(content: str) -> dict[str, str | bool]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
