"""The operators ConsiStory adds to a diffusion model, each with its definition, a fast torch version and a Triton kernel."""
