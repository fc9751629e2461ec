"""Cut the recorded reference runs down to what the tests use every time (under 15 MB), beside this script.

    python tests/golden/make_subset.py RECORDED

RECORDED holds a folder for each recorded case (`case.json`, `golden.safetensors`), `units/` and `weights/`: a tiny SDXL
with random weights, on which the authors' released implementation was run (README.md tells what is in the files).

Kept bit for bit:
  * units/    single operators and modules, without the UNet's intermediate maps and 128x128 outputs;
  * the cases of 19 steps: final latents, masks, matches and a crop of the images. What the cases have in common
    (noise and prompt embeddings) is in shared.safetensors;
  * weights/  all of them, except that a token embedding keeps only the rows of tokens that occur in a recorded prompt
    (`...token_embedding.ids` and `.rows`), and that the tokenizers come without the vocabulary, which the library has.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

TARGET = Path(__file__).parent
CASES = {
    "case1b_batch_n19": [
        "pass1/latents_final", "pass1/mask32_step18", "pass1/mask64_step18",
        "pass2/latents_final", "pass2/mask32_step18", "pass2/mask64_step18",
        "nn/nn_map32", "nn/nn_dist32", "nn/nn_map64", "nn/nn_dist64", "pass2/dist_thr", "pass2/image_crop",
    ],
    "case5_no_share_queries_n19": [
        "pass1/mask32_step18", "pass1/mask64_step18",
        "pass2/latents_final", "pass2/mask32_step18", "pass2/mask64_step18", "pass2/dist_thr",
    ],
}
SHARED = ["init_latents", "prompt_embeds", "pooled_prompt_embeds", "token_indices"]
UNUSED_UNITS = ["unet/sample128", "unet/out128", "unet/inter", "encode_prompt/negative"]
USED_UNITS = ["unet/inter_t261/up0"]
EMBEDDING = "text_model.embeddings.token_embedding"


def keep_cases(recorded: Path) -> None:
    cases = {name: load_file(recorded / name / "golden.safetensors") for name in CASES}
    first, *others = cases.values()
    for key in SHARED:
        assert all(torch.equal(first[key], other[key]) for other in others), key
    save_file({key: first[key] for key in SHARED}, TARGET / "shared.safetensors")
    for name, keys in CASES.items():
        (TARGET / name).mkdir(exist_ok=True)
        save_file({key: cases[name][key] for key in keys}, TARGET / name / "golden.safetensors")
        copy(recorded / name / "case.json", TARGET / name)


def keep_units(recorded: Path) -> None:
    target = TARGET / "units"
    target.mkdir(exist_ok=True)
    for name in ("algo_units.safetensors", "algo_units.json", "model_units.json", "tokenizer.json"):
        copy(recorded / "units" / name, target)
    units = load_file(recorded / "units" / "model_units.safetensors")
    kept = {k: x for k, x in units.items() if k in USED_UNITS or not k.startswith(tuple(UNUSED_UNITS))}
    save_file(kept, target / "model_units.safetensors")


def keep_weights(recorded: Path) -> None:
    weights = recorded / "weights"
    ids = used_ids(recorded)
    for path in sorted(weights.rglob("*")):
        target = TARGET / "weights" / path.relative_to(weights)
        if path.is_dir() or path.name in ("vocab.json", "merges.txt"):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.name.startswith("text_encoder") and path.suffix == ".safetensors":
            save_file(with_sparse_embedding(load_file(path), ids), target)
        else:
            copy(path, target.parent)


def used_ids(recorded: Path) -> Tensor:
    """The ids of every token in a recorded prompt, with both tokenizers' padding."""
    prompts: set[str] = set()
    for path in [*recorded.glob("case*/case.json"), recorded / "units" / "model_units.json"]:
        prompts.update(texts(json.loads(path.read_text(encoding="utf-8"))))
    ids: set[int] = set()
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = CLIPTokenizer.from_pretrained(recorded / "weights" / name)
        for row in tokenizer(sorted(prompts), padding="max_length", max_length=77, truncation=True)["input_ids"]:
            ids.update(row)
    return torch.tensor(sorted(ids))


def texts(case: dict[str, object]) -> Iterable[str]:
    for key in ("prompts", "extra_prompts", "negative_prompts"):
        value = case.get(key, [])
        assert isinstance(value, list)
        yield from value


def with_sparse_embedding(tensors: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    table = tensors.pop(f"{EMBEDDING}.weight")
    return {**tensors, f"{EMBEDDING}.ids": ids, f"{EMBEDDING}.rows": table[ids]}


def copy(source: Path, folder: Path) -> None:
    """The content without the permissions, which may be read-only."""
    shutil.copyfile(source, folder / source.name)


def main() -> None:
    recorded = Path(sys.argv[1])
    keep_cases(recorded)
    keep_units(recorded)
    keep_weights(recorded)
    total = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"{total / 1e6:.1f} MB in {TARGET}")


if __name__ == "__main__":
    main()
