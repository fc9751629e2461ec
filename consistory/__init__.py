"""Training-free consistent text-to-image generation (ConsiStory, Tewel et al. 2024) on SDXL."""
