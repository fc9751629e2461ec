"""CLIP's text encoders. Parameter names are those of transformers' CLIPTextModel and CLIPTextModelWithProjection."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import TextConfig, VisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (rearrange(y, "b t (h d) -> b h t d", h=self.heads) for y in projected)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(rearrange(y, "b h t d -> b t (h d)"))


class MLP(nn.Module):
    def __init__(self, c: TextConfig | VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.width, c.hidden)
        self.fc2 = nn.Linear(c.hidden, c.width)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, c: TextConfig | VisionConfig, causal: bool):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.self_attn = SelfAttention(c.width, c.heads, causal)
        self.layer_norm2 = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocabulary, c.width)
        self.position_embedding = nn.Embedding(c.positions, c.width)

    def forward(self, ids: Tensor, learned: Tensor | None = None) -> Tensor:
        """ids [B, T] -> [B, T, C]. Negative ids select learned embeddings [W, C], -1 the first of them."""
        x = self.token_embedding(ids.clamp(min=0))
        if learned is not None:
            x = torch.where((ids < 0)[..., None], learned[-1 - ids.clamp(max=-1)], x)
        return x + self.position_embedding.weight[: ids.shape[1]]


class Layers(nn.Module):
    def __init__(self, c: TextConfig | VisionConfig, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(Layer(c, causal) for _ in range(c.layers))


class TextModel(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = Layers(c, causal=True)
        self.final_layer_norm = nn.LayerNorm(c.width, eps=c.norm_eps)


class TextEncoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        self.text_projection = (
            None if config.projection is None else nn.Linear(config.width, config.projection, bias=False)
        )

    def forward(self, ids: Tensor, clip_skip: int = 0, learned: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ids [B, T] -> penultimate states [B, T, C] (before the last layer, no final norm) and pooled [B, D].

        clip_skip: take the states from this many layers further up, at most all of them.
        learned: embeddings [W, C] that are not in the vocabulary, of ids -1, -2, ...; see `consistory.words`.
        `pooled` is the final, normed state at the end-of-text token, projected where the encoder has a projection.
        """
        states = [self.text_model.embeddings(ids, learned)]
        for layer in self.text_model.encoder.layers:
            states.append(layer(states[-1]))
        end = ids.argmax(dim=-1)  # end-of-text has the highest id of the vocabulary; padding after it does not count
        state = self.text_model.final_layer_norm(states[-1])[torch.arange(len(ids), device=ids.device), end]
        pooled = state if self.text_projection is None else self.text_projection(state)
        return states[-2 - clip_skip], pooled
