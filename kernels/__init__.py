"""The operators behind ConsiStory, usable on their own: plain PyTorch, and Triton where it runs.

An operator's folder holds its definition (`reference.py`), a fast implementation in plain PyTorch (`packed.py`) and one
in Triton (`fused.py`); the function of the folder picks between them, and `backend=` overrides. `otsu` is one file for
every device. See README.md.
"""
