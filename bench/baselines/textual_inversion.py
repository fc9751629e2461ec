"""Textual Inversion (Gal et al. 2022): a word's embedding learns to stand for one subject; nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from consistory import ConsiStory

from .training import minimise


def learn(pipe: ConsiStory, x0: Tensor, prompt: str, word: str, *, steps: int, rate: float, seed: int) -> list[Tensor]:
    """Embeddings of `word`, one for each text encoder, that lead to the picture with latents x0 [1, 4, h, w].

    They start at those of the word itself. `word` has to be a single token.
    """
    vectors = [
        nn.Parameter(encoder.text_model.embeddings.token_embedding.weight[token(pipe, i, word)].clone())
        for i, encoder in enumerate(pipe.text_encoders)
    ]
    with embedded(pipe, word, vectors):
        minimise(pipe, vectors, x0, prompt, steps=steps, rate=rate, seed=seed)
    return [vector.detach() for vector in vectors]


@contextmanager
def embedded(pipe: ConsiStory, word: str, vectors: list[nn.Parameter] | list[Tensor]) -> Iterator[None]:
    """In prompts, `word` has these embeddings."""
    with ExitStack() as stack:
        for i, (encoder, vector) in enumerate(zip(pipe.text_encoders, vectors, strict=True)):
            place = token(pipe, i, word)

            def swap(module: nn.Module, inputs: tuple[Tensor], rows: Tensor, vector=vector, place=place) -> Tensor:
                return torch.where((inputs[0] == place)[..., None], vector, rows)

            handle = encoder.text_model.embeddings.token_embedding.register_forward_hook(swap)
            stack.callback(handle.remove)
        yield


def token(pipe: ConsiStory, encoder: int, word: str) -> int:
    return int(pipe.tokenizers[encoder].encode([word])[0, 1])
