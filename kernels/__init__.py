"""The operators behind ConsiStory, usable on their own: plain PyTorch, and Triton where it runs.

Every operator is a folder: `reference.py` is the definition, `packed.py` the fast version without Triton, `fused.py` the Triton
version, and the folder's own function picks between them (`backend=` overrides). See README.md.
"""
