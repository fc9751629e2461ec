"""Names of the hub, with a hub that is a dictionary or a cache folder; no test needs the network."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file

from consistory import ConsiStory
from consistory.weights import hub
from consistory.weights.errors import ConsistoryError

NAME = "someone/some-model"
PLAIN, FP16 = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
SETTINGS = {
    "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json",
    "text_encoder/config.json", "text_encoder_2/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
    "tokenizer_2/vocab.json", "tokenizer_2/merges.txt",
}  # fmt: skip
BOTH = {f"{part}/{file}" for part in ("unet", "vae") for file in (PLAIN, FP16)} | {
    f"{part}/model{variant}.safetensors" for part in ("text_encoder", "text_encoder_2") for variant in ("", ".fp16")
}
OTHERS = {
    "README.md", "sd_xl_base_1.0.safetensors", "unet/model.onnx", "unet/diffusion_pytorch_model.bin",
    "text_encoder/flax_model.msgpack", "vae_1_0/config.json", f"vae_1_0/{PLAIN}", "vae_decoder/model.onnx",
}  # fmt: skip


class Hub:
    """Stands for the hub: notes what is downloaded from a repository of these files."""

    def __init__(self, files: set[str], folder: Path) -> None:
        self.files, self.folder = files, folder
        self.downloaded: set[str] = set()

    def model_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in sorted(self.files)])

    def snapshot_download(self, name: str, allow_patterns: list[str]) -> str:
        self.downloaded |= {file for file in self.files for pattern in allow_patterns if fnmatch(file, pattern)}
        return str(self.folder)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Hub]:
    def install(files: set[str], folder: Path = tmp_path) -> Hub:
        fake = Hub(files, folder)
        monkeypatch.setattr(huggingface_hub, "model_info", fake.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
        return fake

    return install


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub's cache, without network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def cached(cache: Path, content: Path) -> None:
    """A repository in the cache's layout, as if downloaded before."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    shutil.copytree(content, repository / "snapshots" / "0123abcd")


def assert_says(error: pytest.ExceptionInfo[ConsistoryError], *facts: object) -> None:
    assert "\n" not in str(error.value)
    for fact in facts:
        assert str(fact) in str(error.value)


# --- which names are of the hub ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", True), ("a/b", True), ("sprites", False), ("a/b/c", False),
        ("./model", False), ("../model", False), ("/model", False), ("~/model", False), ("model/", False),
        ("models/sd_xl_base.safetensors", False), ("a b/c", False), ("", False), (Path("a/b"), True),
    ],
)  # fmt: skip
def test_a_name_of_two_parts(name: str | Path, expected: bool) -> None:
    assert hub.is_id(name) is expected


def test_a_folder_of_that_name_goes_first(
    golden_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: Callable[..., Hub]
) -> None:
    fake = online(SETTINGS | BOTH)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(golden_weights, tmp_path / NAME)
    assert ConsiStory.from_pretrained(NAME).name == NAME
    assert not fake.downloaded


# --- what is downloaded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "weights"),
    [(None, {file for file in BOTH if "fp16" not in file}), ("fp16", {file for file in BOTH if "fp16" in file})],
)
def test_what_is_needed_and_no_more(variant: str | None, weights: set[str], online: Callable[..., Hub]) -> None:
    fake = online(SETTINGS | BOTH | OTHERS)
    assert hub.checkpoint_folder(NAME, variant) == fake.folder
    assert fake.downloaded == SETTINGS | weights


def test_the_only_variant_there_is(online: Callable[..., Hub]) -> None:
    weights = {file for file in BOTH if "fp16" in file}
    fake = online(SETTINGS | weights | OTHERS)
    hub.checkpoint_folder(NAME, None)
    assert fake.downloaded == SETTINGS | weights


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_of_the_variant(variant: str | None, online: Callable[..., Hub]) -> None:
    shards = {
        None: {"unet/diffusion_pytorch_model.safetensors.index.json"}
        | {f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)},
        "fp16": {"unet/diffusion_pytorch_model.safetensors.index.fp16.json"}
        | {f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)},
    }
    other = {file for file in BOTH if not file.startswith("unet/")}
    fake = online(SETTINGS | other | shards[None] | shards["fp16"])
    hub.checkpoint_folder(NAME, variant)
    assert {file for file in fake.downloaded if "unet/diffusion" in file} == shards[variant]


@pytest.mark.parametrize(
    ("files", "variant", "says"),
    [
        (SETTINGS | BOTH, "fp8", "no weights of variant fp8: choose one that it has: (none), fp16"),
        (SETTINGS | {f"{part}/pytorch_model.bin" for part in ("unet", "vae")}, None, "is pickled"),
        ({"README.md"}, None, "has no safetensors file"),
    ],
)
def test_nothing_is_downloaded_if_something_is_missing(
    files: set[str], variant: str | None, says: str, online: Callable[..., Hub]
) -> None:
    fake = online(files)
    with pytest.raises(ConsistoryError) as error:
        hub.checkpoint_folder(NAME, variant)
    assert_says(error, NAME, says)
    assert not fake.downloaded


@pytest.mark.parametrize(
    ("files", "needed"),
    [
        ({"config.json", PLAIN, "diffusion_pytorch_model.bin", "sdxl_vae.safetensors"}, {"config.json", PLAIN}),
        (SETTINGS | BOTH, {"model_index.json", "vae/config.json", f"vae/{PLAIN}"}),
    ],
)
def test_an_autoencoder(files: set[str], needed: set[str], online: Callable[..., Hub]) -> None:
    fake = online(files)
    hub.vae_folder(NAME)
    assert fake.downloaded == needed


# --- without network --------------------------------------------------------------------------------------------------


def test_a_model_that_is_cached(golden_weights: Path, cache: Path) -> None:
    cached(cache, golden_weights)
    pipe = ConsiStory.from_pretrained(NAME)
    assert pipe.name == NAME
    (file,) = (golden_weights / "unet").glob("*.safetensors")
    assert pipe.unet.conv_in.weight.equal(load_file(file)["conv_in.weight"])


def test_an_autoencoder_that_is_cached(golden_weights: Path, cache: Path) -> None:
    cached(cache, golden_weights / "vae")
    pipe = ConsiStory.from_pretrained(golden_weights, vae=NAME)
    assert pipe.other_vae == NAME


def test_a_model_that_is_cached_in_part(golden_weights: Path, cache: Path) -> None:
    cached(cache, golden_weights)
    for file in cache.rglob("unet/*.safetensors"):
        file.unlink()
    with pytest.raises(ConsistoryError) as error:
        ConsiStory.from_pretrained(NAME)
    assert_says(error, "unet has no safetensors file: download the whole checkpoint folder again")


def test_a_model_that_is_not_cached(cache: Path) -> None:
    with pytest.raises(ConsistoryError) as error:
        ConsiStory.from_pretrained(NAME)
    assert_says(error, NAME, "neither a folder nor in the hub's cache, and the hub cannot be reached: check the name")


# --- what the hub may answer ------------------------------------------------------------------------------------------


def response(kind: type[Exception]) -> Exception:
    """An error of the hub's, whose constructors differ among its versions."""
    return kind.__new__(kind, "404 Client Error.\n\nLong story.")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (GatedRepoError, "is gated: accept its terms"),
        (RepositoryNotFoundError, "is neither a folder nor on the hub: check the name"),
        (LocalEntryNotFoundError, "the hub cannot be reached"),
        (OSError, "cannot be downloaded (OSError: 404 Client Error. Long story.): try again"),
    ],
)
@pytest.mark.parametrize("step", ["model_info", "snapshot_download"])
def test_errors_of_the_hub(
    kind: type[Exception], says: str, step: str, online: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they are met: the hub lists a gated model's files, but does not hand them out."""
    online(SETTINGS | BOTH)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("404 Client Error.\n\nLong story.") if kind is OSError else response(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    if step == "model_info":
        monkeypatch.setattr(huggingface_hub, "model_info", fail)
    with pytest.raises(ConsistoryError) as error:
        ConsiStory.from_pretrained(NAME)
    assert_says(error, NAME, says)


# --- the package ------------------------------------------------------------------------------------------------------


def test_the_package_comes_with_tokenizers() -> None:
    requirements = importlib.metadata.requires("tokenizers") or []
    assert any(requirement.startswith("huggingface-hub") or requirement.startswith("huggingface_hub")
               for requirement in requirements if "extra" not in requirement)  # fmt: skip


def test_the_package_is_imported_for_its_names_only(golden_weights: Path, tmp_path: Path) -> None:
    program = """
import sys
from consistory import ConsiStory
ConsiStory.from_pretrained(sys.argv[1])
print("huggingface_hub" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(golden_weights)], capture_output=True, text=True, timeout=300
    )
    assert json.loads(done.stdout.lower()) is False, done.stderr
