"""Training-free consistent text-to-image generation (ConsiStory, Tewel et al. 2024) on SDXL."""

from consistory.weights.errors import ConsistoryError

from .config import ConsistoryConfig, FreeU, QueryBlend
from .model import ConsiStory, Story

__all__ = ["ConsiStory", "ConsistoryConfig", "ConsistoryError", "FreeU", "QueryBlend", "Story"]
__version__ = "0.1.0"
