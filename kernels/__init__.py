"""The operators behind ConsiStory, usable on their own: plain PyTorch, and Triton where it runs.

Every operator is a folder: `reference.py` is the definition, `packed.py` the fast one without Triton, `fused.py` the
Triton one, and the folder's own function picks between them (`backend=` overrides). See README.md.
"""
