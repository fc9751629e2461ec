"""Words that a model has learned, by textual inversion [1]: embeddings in a file of their own, for use in prompts.

    word = Word.load("negativeXL_D.safetensors")  # written as the file is named, or name="..."
    pipe = pipe.with_word(word)
    story = pipe(subject="a cat", settings=[...], negative_prompt="negativeXL_D")

A word takes the place of as many tokens as it has vectors. Files are those of SDXL's trainers: a tensor for each of the
two text encoders, `clip_l` and `clip_g`.

[1] Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion", 2022.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from consistory.weights.errors import ConsistoryError
from consistory.weights.loading import is_finite, listed, open_safetensors

KEYS = ("clip_l", "clip_g")


@dataclass(frozen=True, eq=False)
class Word:
    """name: how prompts write it, in any case.  vectors: [V, C] for each text encoder.  file: that they are from."""

    name: str
    vectors: tuple[Tensor, Tensor] = field(repr=False)
    file: str

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> Word:
        """Read a `.safetensors` file. name: by default the file's own, without its ending.

        Raises ConsistoryError if the file is missing, damaged, pickled or no embedding of SDXL, or the name is empty.
        """
        path = Path(path)
        name = path.stem if name is None else name.strip()
        if not name:
            raise ConsistoryError(f"the word of {path} has no name: give one that prompts can write")
        file = open_safetensors(path)
        keys = set(file.keys())
        if keys != {*KEYS}:
            raise ConsistoryError(
                f"{path} is no embedding of SDXL, which would hold {' and '.join(KEYS)} (it holds "
                f"{listed(keys) or 'nothing'}): give one that was made for SDXL"
            )
        first, second = (file.get_tensor(key).float() for key in KEYS)
        if first.dim() != 2 or second.dim() != 2 or not 0 < len(first) == len(second):
            raise ConsistoryError(
                f"{path} holds {list(first.shape)} and {list(second.shape)}, not the same number of vectors for both "
                "text encoders: download it again"
            )
        if not (is_finite(first) and is_finite(second)):
            raise ConsistoryError(f"{path} holds NaN or infinity: download it again")
        return cls(name, (first, second), str(path))

    @property
    def identity(self) -> str:
        """Tells words apart by what they do."""
        digest = hashlib.sha256(self.name.lower().encode())
        for vectors in self.vectors:
            digest.update(vectors.numpy().tobytes())
        return digest.hexdigest()
