"""Words that a model has learned, by textual inversion [1]: embeddings in a file of their own, for use in prompts.

    word = Word.load("negativeXL_D.safetensors")  # written as the file is named, or name="..."
    pipe = pipe.with_word(word)
    story = pipe(subject="a cat", settings=[...], negative_prompt="negativeXL_D")

A word takes the place of as many tokens as it has vectors. Files are those of SDXL's trainers: a tensor for each of the
two text encoders.

[1] Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion", 2022.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from consistory.weights.errors import ConsistoryError
from consistory.weights.loading import is_finite, listed, open_safetensors

# What trainers call the tensors of the first and the second encoder; {word} is the name that a LoRA file keeps it by.
LAYOUTS = (
    ("clip_l", "clip_g"),
    ("text_encoders_0", "text_encoders_1"),
    ("bundle_emb.{word}.clip_l", "bundle_emb.{word}.clip_g"),
)


@dataclass(frozen=True, eq=False)
class Word:
    """name: how prompts write it, in any case.  vectors: [V, C] for each text encoder.  file: where they are from."""

    name: str
    vectors: tuple[Tensor, Tensor] = field(repr=False)
    file: str

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> Word:
        """Read a `.safetensors` file. name: by default the file's own, without its ending.

        Of a LoRA file that brings words along, `name` says which one.
        Raises ConsistoryError if the file is missing, damaged, pickled or not an SDXL embedding, or the name is empty.
        """
        path = Path(path)
        name = path.stem if name is None else name
        if not isinstance(name, str) or not name.strip():
            raise ConsistoryError(f"the word of {path} has the name {name!r}: give one that prompts can write")
        file = open_safetensors(path)
        held = set(file.keys())
        layouts = [[key.format(word=name) for key in keys] for keys in LAYOUTS]
        keys = next((keys for keys in layouts if held.issuperset(keys)), None)
        if keys is None:
            raise ConsistoryError(
                f"{path} is not an SDXL embedding, which would hold {' and '.join(LAYOUTS[0])} (it holds "
                f"{listed(held) or 'nothing'}): give one that was made for SDXL; of several words in it, name one"
            )
        first, second = (file.get_tensor(key).float() for key in keys)
        if first.dim() != 2 or second.dim() != 2 or not 0 < len(first) == len(second):
            raise ConsistoryError(
                f"{path} holds {list(first.shape)} and {list(second.shape)}, not the same number of vectors for both "
                "text encoders: download it again"
            )
        if not (is_finite(first) and is_finite(second)):
            raise ConsistoryError(f"{path} holds NaN or infinity: download it again")
        return cls(name.strip(), (first, second), str(path))

    @property
    def identity(self) -> str:
        """Tells words apart by what they do."""
        digest = hashlib.sha256(self.name.lower().encode())
        for vectors in self.vectors:
            digest.update(vectors.float().cpu().numpy().tobytes())
        return digest.hexdigest()
