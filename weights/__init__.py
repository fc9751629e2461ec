"""Checkpoints: reading safetensors, naming parameters, filling modules; and the embedded model, sprites."""
