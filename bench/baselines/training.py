"""What the trained baselines have in common: a loss on one picture, minimised over a few parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistory import ConsiStory, ddim
from consistory.unet import Conditioning
from consistory.weights.sprites.train import MatmulAttention

BATCH = 4


def minimise(
    pipe: ConsiStory, parameters: Sequence[nn.Parameter], x0: Tensor, prompt: str, *, steps: int, rate: float, seed: int
) -> None:
    """Make the model predict the noise in noised latents x0 [1, 4, h, w] of a picture, given its prompt."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        loss = denoising_loss(pipe, x0, prompt, torch.Generator().manual_seed(seed + step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def denoising_loss(pipe: ConsiStory, x0: Tensor, prompt: str, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted noise at BATCH random timesteps."""
    alpha_bars = ddim.alpha_bars(pipe.schedule)
    t = torch.randint(len(alpha_bars), (BATCH,), generator=generator)
    eps = torch.randn(BATCH, *x0.shape[1:], generator=generator)
    alpha_bar = alpha_bars[t][:, None, None, None]
    x = ddim.add_noise(x0, eps, alpha_bar)
    context, pooled = (states.expand(BATCH, *states.shape[1:]) for states in pipe.encode_prompts([prompt]))
    height, width = (pipe.vae.config.stride * side for side in x0.shape[-2:])
    sizes = torch.tensor([height, width, 0, 0, height, width]).expand(BATCH, 6)
    return F.mse_loss(pipe.unet(x, t, Conditioning(context, pooled, sizes), MatmulAttention()), eps)
