"""Sprites: a small cartoon world and the model trained on it, in SDXL's layout."""
