"""Prompt -> token ids, and where a concept's tokens are in a prompt.

CLIP's byte-pair encoding [1], built from `tokenizers` parts. Text is cleaned as transformers' original (slow)
CLIPTokenizer does without ftfy: control characters dropped, white space collapsed, Chinese characters set apart,
Unicode NFC, lower case, accents kept. (The fast one neither drops control characters nor sets Chinese apart.)

[1] Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, section 2.4.
"""

import copy
import logging
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from tokenizers import AddedToken, Regex
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, BertNormalizer, Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from torch import Tensor

import consistory.weights
from consistory.weights.errors import ConsistoryError
from consistory.weights.loading import read_json

logger = logging.getLogger(__name__)

START, END = "<|startoftext|>", "<|endoftext|>"
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
CLIP_LENGTH = 77
CLIP_VOCABULARY = Path(consistory.weights.__file__).parent / "vocabulary"

Merges = list[tuple[str, str]]


class Piece(NamedTuple):
    """A token of a text.  word: the same for all tokens of a word.  start: where it begins in the text."""

    id: int
    word: tuple[int, int | None]
    start: int


class Tokenizer:
    """One CLIP tokenizer: a vocabulary, a padding token and the number of tokens L that the text encoder takes.

    learned: words that are not in the vocabulary, and their ids, below zero.
    """

    def __init__(self, vocabulary: dict[str, int], merges: Merges, pad: str = END, length: int = CLIP_LENGTH) -> None:
        self._bpe = _byte_pair_encoding(vocabulary, merges, pad)
        self.length = length
        self.start, self.end, self.pad = (vocabulary[token] for token in (START, END, pad))
        self.learned: dict[str, list[int]] = {}

    @classmethod
    def clip(cls, pad: str = END) -> "Tokenizer":
        """CLIP's own vocabulary, bundled. SDXL pads with "<|endoftext|>" for its first encoder, "!" for its second."""
        return cls(*_read_vocabulary(CLIP_VOCABULARY), pad=pad)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """A tokenizer as diffusers saves it: `vocab.json` and `merges.txt`, or `tokenizer.json`; and its settings.

        Raises ConsistoryError if a file is missing or damaged.
        """
        vocabulary, merges = _read_vocabulary(folder)
        settings = read_json(folder / "tokenizer_config.json")
        special = folder / "special_tokens_map.json"
        if special.exists():
            settings |= read_json(special)
        pad = settings.get("pad_token", END)
        pad = pad if isinstance(pad, str) else pad["content"]
        missing = [token for token in (START, END, pad) if token not in vocabulary]
        if missing:
            raise ConsistoryError(f"{folder} is not a CLIP tokenizer (no {', '.join(missing)}): use an SDXL checkpoint")
        return cls(vocabulary, merges, pad, settings.get("model_max_length", CLIP_LENGTH))

    def with_word(self, word: str, tokens: int) -> "Tokenizer":
        """The same tokenizer with one more learned word. Where it stands by itself, in any case, it becomes `tokens`
        ids below zero: -1, -2, ...; the next learned word goes on from there.

        Raises ConsistoryError if it has learned this word already.
        """
        name = " ".join(_composed(word).split())
        if name.lower() in map(str.lower, self.learned):
            raise ConsistoryError(f"there are two words {word!r}: give one of them another name")
        last = min((ids[-1] for ids in self.learned.values()), default=0)
        other = copy.copy(self)
        other.learned = {**self.learned, name: [last - 1 - i for i in range(tokens)]}
        return other

    def unused(self, texts: Sequence[str]) -> list[str]:
        """The learned words that none of the texts has."""
        used = {piece.id for text in texts for piece in self._pieces(_composed(text))}
        return [name for name, ids in self.learned.items() if ids[0] not in used]

    def encode(self, prompts: Sequence[str], *, warn: bool = True) -> Tensor:
        """Prompts -> ids, int64 [B, L]: start, pieces, end, padding.

        What does not fit is cut off; unless `warn` is false (SDXL encodes each prompt twice) the log says what.
        """
        ids = torch.full((len(prompts), self.length), self.pad, device="cpu")
        for row, prompt in zip(ids, map(_composed, prompts), strict=True):
            pieces = self._pieces(prompt)
            if warn and len(pieces) > self._room:
                lost = prompt[pieces[self._room].start :]
                logger.warning("the prompt is longer than %d tokens; this part is ignored: %r", self.length, lost)
            kept = [self.start, *(piece.id for piece in pieces[: self._room]), self.end]
            row[: len(kept)] = torch.tensor(kept, device="cpu")
        return ids

    def concept_positions(self, prompts: Sequence[str], concept: str) -> Tensor:
        """Where the concept is in each prompt: float32 [B, L], the weight of every token, each row summing to 1.

        A concept is a word or phrase, found wherever its pieces stand as whole words, in any case ("cat" is in "Cat,
        sleeping" and "the cat's hat", not in "cats" or "alleycat"). All occurrences and all pieces weigh the same.
        The paper's authors take the last place of the first piece: the same where one piece occurs once.

        Raises ConsistoryError if the concept is empty, or a prompt lacks it or has it only beyond the part that fits.
        """
        pieces = [piece.id for piece in self._pieces(_composed(concept))]
        if not pieces:
            raise ConsistoryError(f"the concept {concept!r} is empty: give a word or phrase that all prompts contain")
        weights = torch.zeros(len(prompts), self.length, dtype=torch.float32, device="cpu")
        for row, prompt in zip(weights, prompts, strict=True):
            found = _occurrences(pieces, self._pieces(_composed(prompt)))
            kept = [start for start in found if start + len(pieces) <= self._room]
            if not found:
                raise ConsistoryError(f"the concept {concept!r} is not in the prompt {prompt!r}: name it there")
            if not kept:
                limit = f"after its first {self.length} tokens, which are all that is read"
                raise ConsistoryError(f"the concept {concept!r} comes in {prompt!r} only {limit}: move it forward")
            for start in kept:
                row[1 + start : 1 + start + len(pieces)] += 1 / (len(kept) * len(pieces))
        return weights

    @property
    def _room(self) -> int:
        return self.length - 2

    def _pieces(self, text: str) -> list[Piece]:
        """The pieces of a text in NFC."""
        names = sorted(self.learned, key=len, reverse=True)  # of two that begin alike, the longer one
        groups = (f"({_any_space(name)})" for name in names)
        learned = re.compile(rf"(?<!\w)(?:{'|'.join(groups)})(?!\w)" if names else "(?!)", re.IGNORECASE)
        pieces, start = [], 0
        for number, match in enumerate([*learned.finditer(text), None]):
            end = len(text) if match is None else match.start()
            found = self._bpe.encode(text[start:end], add_special_tokens=False)
            own = zip(found.ids, found.word_ids, found.offsets, strict=True)
            pieces += [Piece(id, (number, word), start + offset) for id, word, (offset, _) in own]
            if match is not None and match.lastindex is not None:
                pieces += [Piece(id, (number, -1), end) for id in self.learned[names[match.lastindex - 1]]]
                start = match.end()
        return pieces


def _composed(text: str) -> str:
    """In Unicode's NFC: accents with their letters, as words are learned."""
    return unicodedata.normalize("NFC", text)


def _any_space(name: str) -> str:
    """A pattern for the words of a name, with any white space between them."""
    return r"\s+".join(map(re.escape, name.split()))


def _byte_pair_encoding(vocabulary: dict[str, int], merges: Merges, pad: str) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(BPE(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>"))
    clean = BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False)
    bpe.normalizer = Normalizers([clean, NFC(), Lowercase()])
    words = Split(Regex(WORD), behavior="removed", invert=True)
    bpe.pre_tokenizer = PreTokenizers([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    # The padding token is special too: with SDXL's second tokenizer every "!" of a prompt is one padding token.
    bpe.add_special_tokens([AddedToken(token, normalized=True) for token in (START, END, pad)])
    return bpe


def _occurrences(pieces: list[int], prompt: list[Piece]) -> list[int]:
    """Where in the prompt `pieces` begin a word. (They also end one: a word's last piece is marked.)"""
    ids = [piece.id for piece in prompt]
    return [
        start
        for start in range(len(prompt) - len(pieces) + 1)
        if ids[start : start + len(pieces)] == pieces and (start == 0 or prompt[start].word != prompt[start - 1].word)
    ]


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], Merges]:
    """Raises ConsistoryError if a file is missing or damaged."""
    path = folder / "merges.txt"
    try:
        if (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
            path = folder / "tokenizer.json"
            model = read_json(path)["model"]
            return model["vocab"], [_merge(merge) for merge in model["merges"]]
        vocabulary = read_json(folder / "vocab.json")
        lines = path.read_text(encoding="utf-8").splitlines()
        return vocabulary, [_merge(line) for line in lines if line and not line.startswith("#version")]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ConsistoryError(f"cannot read {path} ({reason}): download it again") from None


def _merge(pieces: str | list[str]) -> tuple[str, str]:
    """Two pieces that are joined: a list, or one string, as `merges.txt` and older `tokenizer.json` files have them."""
    left, right = pieces.split() if isinstance(pieces, str) else pieces
    return left, right
