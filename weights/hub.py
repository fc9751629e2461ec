"""Checkpoints from the Hugging Face hub: an id -> a folder in the hub's cache, downloaded to if need be.

`huggingface_hub`, which comes with tokenizers, is imported when a name turns out to be an id, not before.
"""

import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path, PurePosixPath

from consistory.weights.errors import ConsistoryError
from consistory.weights.loading import COMPONENTS, SHARD, choose_weights, variant_of

ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)", re.ASCII)
SETTINGS = ("scheduler", "tokenizer", "tokenizer_2")

Files = list[str]  # paths within a repository


def is_id(name: str | Path) -> bool:
    """Whether a name reads like "owner/model" and is not a path of this machine."""
    return ID.fullmatch(str(name)) is not None and not Path(name).exists()


def checkpoint_folder(name: str, variant: str | None) -> Path:
    """The folder of a checkpoint in the diffusers layout, with what loading needs and no more.

    Without network, or with HF_HUB_OFFLINE=1, it is what the cache has.
    Raises ConsistoryError if there is no such model, it is gated, has no such variant, or cannot be obtained.
    """

    def needed(files: Files) -> Files:
        settings = [file for file in files if PurePosixPath(file).parent.name in SETTINGS]
        components = chain.from_iterable(_component(name, files, part, variant) for part in COMPONENTS)
        return ["model_index.json", *settings, *components]

    return _download(name, needed, ["model_index.json"])


def vae_folder(name: str) -> Path:
    """The folder of an autoencoder on its own, or of a whole checkpoint. Raises ConsistoryError as for a checkpoint."""

    def needed(files: Files) -> Files:
        if "model_index.json" in files:
            return ["model_index.json", *_component(name, files, "vae", None)]
        return _component(name, files, ".", None)

    return _download(name, needed, ["config.json", "vae/config.json"])


def _component(name: str, files: Files, part: str, variant: str | None) -> Files:
    """A component's configuration, and its weights in one file or in shards with their index."""
    folder = PurePosixPath(part)
    own = [file.name for file in map(PurePosixPath, files) if file.parent == folder]
    weights = choose_weights(own, variant, f"{name}/{part}")
    shards = [file for file in own if SHARD.search(file) and variant_of(file) == variant_of(weights)]
    chosen = ["config.json", weights, *(shards if weights.endswith(".json") else [])]
    return [str(folder / file) for file in chosen]


def _download(name: str, needed: Callable[[Files], Files], cached: Files) -> Path:
    """A repository's folder in the cache.

    needed: of all the repository's files, those to download if the cache lacks them.
    cached: where the hub cannot be asked what there is, files that tell whether the cache has the repository.
    """
    import huggingface_hub
    from huggingface_hub.utils import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        siblings = huggingface_hub.model_info(name).siblings or []
    except Exception:  # no network has many names; any other trouble, the download below meets again
        wanted = cached
    else:
        wanted = needed([file.rfilename for file in siblings])
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except GatedRepoError:
        reason, advice = "is gated", "accept its terms on its page of the hub, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason, advice = "is neither a folder nor on the hub", "check the name, or log in if the model is private"
    except LocalEntryNotFoundError:
        reason = "is neither a folder nor in the hub's cache, and the hub cannot be reached"
        advice = "check the name and the network"
    except Exception as error:
        reason = f"cannot be downloaded ({type(error).__name__}: {' '.join(str(error).split())})"
        advice = "try again, or give a folder"
    raise ConsistoryError(f"{name} {reason}: {advice}")
