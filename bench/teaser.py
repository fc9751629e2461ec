"""The picture at the top of the README: plain SDXL above, ConsiStory below, same prompts and noise.

python bench/teaser.py --subject "a cat" --seed 7
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from consistory import ConsiStory, ConsistoryConfig
from consistory.files import write_atomically
from consistory.images import encode_png, make_grid

SETTINGS = ["on the beach", "in the snow", "in space", "in the city at night", "in a meadow"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="a cat")
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--model", default="sprites")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "teaser.png")
    args = parser.parse_args()

    pipe = ConsiStory.from_pretrained(args.model)
    rows = [
        make_grid(
            pipe(subject=args.subject, settings=args.settings, seed=args.seed, steps=args.steps, config=config).images
        )
        for config in (ConsistoryConfig.vanilla(), ConsistoryConfig())
    ]
    gap = np.full((16, *rows[0].shape[1:]), 255, np.uint8)
    picture = np.concatenate([rows[0], gap, rows[1]])[::2, ::2]  # half the grid's size is enough for a page
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, encode_png(picture, {"prompt": f"{args.subject}: {', '.join(args.settings)}"}))


if __name__ == "__main__":
    main()
