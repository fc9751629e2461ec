from pathlib import Path

from setuptools import find_packages, setup

# `kernels` and `weights` live beside `consistory` in the repository and install inside it: as top-level packages they
# would overwrite others of the same name.
HOUSE = {"consistory": "consistory", "consistory.kernels": "kernels", "consistory.weights": "weights"}

# Interprets and compiles the kernels where there is no GPU. No requirement of the library's: PyTorch's builds for CUDA
# bring a Triton, each in the one version that it works with.
TRITON = "triton>=3.4; platform_system == 'Linux' and platform_machine == 'x86_64'"

setup(
    name="consistory",
    version="0.1.0",
    description="Training-free consistent text-to-image generation (ConsiStory) on SDXL, in plain PyTorch and Triton",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir=HOUSE,
    packages=[
        package for root, folder in HOUSE.items() for package in [root, *(f"{root}.{p}" for p in find_packages(folder))]
    ],
    package_data={
        "consistory": ["py.typed", "explain.html"],
        "consistory.weights": [
            "vocabulary/*",
            "sdxl/*.json",
            "sprites/*.safetensors",
            "sprites/checkpoint/*.json",
            "sprites/checkpoint/*/*",
            "sprites/control/*",
        ],
    },
    install_requires=[
        "torch>=2.5",
        "safetensors>=0.4",
        "tokenizers>=0.15",
        "numpy>=1.24",
        "einops>=0.7",
    ],
    extras_require={
        "cli": ["pillow>=9", "tqdm>=4.60"],
        "evaluate": ["pillow>=9", "tqdm>=4.60", "pyyaml>=6"],
        "test": [
            "pytest>=7", "ruff", "mypy", "setuptools>=77", "pillow>=9", "tqdm>=4.60", "pyyaml>=6",
            "diffusers>=0.30", "transformers>=4.40", "accelerate", "peft>=0.12", "scikit-image>=0.22",
            TRITON,
        ],
        "bench": ["matplotlib>=3.7", "pillow>=9", "tqdm>=4.60", TRITON],
    },
    entry_points={"console_scripts": ["consistory = consistory.cli:main"]},
)
