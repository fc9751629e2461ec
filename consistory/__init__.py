"""Training-free consistent text-to-image generation (ConsiStory, Tewel et al. 2024) on SDXL."""

from typing import TYPE_CHECKING, Any

from consistory.weights.errors import ConsistoryError

from .config import ConsistoryConfig, FreeU, QueryBlend

if TYPE_CHECKING:
    from .controlnet import Control, ControlNet
    from .model import ConsiStory, Story

__all__ = ["ConsiStory", "ConsistoryConfig", "ConsistoryError", "Control", "ControlNet", "FreeU", "QueryBlend", "Story"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what needs torch, which takes seconds, when it is first asked for: `consistory --help` does not wait."""
    if name in ("ConsiStory", "Story"):
        from . import model

        return getattr(model, name)
    if name in ("Control", "ControlNet"):
        from . import controlnet

        return getattr(controlnet, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
