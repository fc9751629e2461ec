"""Checkpoints: reading safetensors, naming parameters, filling modules. Imports nothing of `consistory` outside this folder."""
