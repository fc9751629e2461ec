"""The ControlNet that comes with `sprites`: a silhouette in, a picture of that outline out."""

from __future__ import annotations

import numpy as np
import torch

from consistory import ConsiStory, ConsistoryConfig, Control, ControlNet
from consistory.controlnet import SPRITES
from consistory.weights.sprites.oracle import Oracle
from consistory.weights.sprites.world import SUBJECTS, render, sample_scenes


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in SPRITES.iterdir()) <= 8 * 2**20


def test_pictures_fill_their_silhouettes() -> None:
    pipe, net, oracle = ConsiStory.from_pretrained("sprites"), ControlNet.from_pretrained("sprites"), Oracle.load()
    scenes = sample_scenes(3, torch.Generator().manual_seed(2**41), second_subject=0.0)
    scenes.subject[:] = SUBJECTS.index("cat")
    _, silhouettes = render(scenes)
    pictures = np.repeat(255 * silhouettes[..., None].numpy().astype(np.uint8), 3, axis=-1)
    story = pipe(
        subject="a cat", settings=["on the beach", "in the snow", "in space"], seed=5, steps=12,
        config=ConsistoryConfig.vanilla(), controls=[Control(net, pictures)],
    )  # fmt: skip
    found = oracle.read(story.images).mask
    overlap = (found & silhouettes).sum(dim=(1, 2)) / (found | silhouettes).sum(dim=(1, 2))
    assert overlap.min() > 0.5 and overlap.mean() > 0.7
