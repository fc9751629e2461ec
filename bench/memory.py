"""The peak of memory of a story at SDXL's size, by option, and what runs when it is reached.

    python bench/memory.py                   # modelled, on any machine
    python bench/memory.py --device cuda     # measured: the allocator's statistics, random weights

The model runs the library itself on tensors that have a shape but no values (device "meta"), as on a GPU with Triton,
and counts the bytes of those that live: every tensor that PyTorch makes, until the last reference to it is gone.
Attention is modelled as fused kernels have it, a result and its log-sum-exp, no scores. Nothing depends on what masks
hold: the Triton kernels allocate for the worst case. Not modelled are the workspaces within convolutions and matrix
products, what the allocator loses to rounding and fragments, and the CUDA context (about half a GiB).

How well counting tells a peak is checked on the CPU, where the same story is counted, recorded by PyTorch's profiler
(which sees allocations, not tensors) and measured as the growth of the process. These two include the workspaces.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest.mock import patch

import torch
import triton
from measure import machine, write
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from consistory import ConsiStory, ConsistoryConfig, QueryBlend, model
from consistory.config import ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from consistory.text import TextEncoder
from consistory.tokenizer import Tokenizer
from consistory.unet import UNet
from consistory.vae import VAE
from consistory.weights import loading
from consistory.weights.loading import COMPONENTS, TensorSource, sdxl_configs

Configs = dict[str, dict[str, Any]]

GIB = 2**30
SETTINGS = ["on the beach", "in the snow", "in space", "at home", "in a meadow", "by night", "in the rain", "in a cafe"]
BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "unet": lambda c: UNet(UNetConfig.from_json(c)),
    "vae": lambda c: VAE(VAEConfig.from_json(c)),
    "text_encoder": lambda c: TextEncoder(TextConfig.from_json(c)),
    "text_encoder_2": lambda c: TextEncoder(TextConfig.from_json(c)),
}

# Four steps that are like any of fifty: a plain one; two that blend vanilla queries, the latter in both passes, and in
# the second it injects, too; and one that does neither while the first pass's state is kept. A story of 50 has 46 more
# cross-attention maps, 4 KiB each a picture.
STEPS = 4
CONFIG = ConsistoryConfig(query_blend=QueryBlend(fraction=1 / 2), injection_window=(1 / 2, 1 / 2))


@dataclass(frozen=True)
class Option:
    """How a model is loaded, and in what chunks its stories are told."""

    offload: bool = False
    tile: int | None = None
    chunk: int | None = None


OPTIONS = {
    "plain": Option(),
    "chunk 1": Option(chunk=1),
    "tile 32": Option(tile=32),
    "offload": Option(offload=True),
    "offload, chunk 1, tile 32": Option(offload=True, tile=32, chunk=1),
}


class Meter(Protocol):
    """Takes down the peak of each phase in bytes, by its name, and the module that ran then, if it can tell."""

    peaks: dict[str, int]
    places: dict[str, str]

    def during(self, phase: str) -> AbstractContextManager[None]: ...


class AllocatorMeter:
    """Asks PyTorch's CUDA allocator."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = defaultdict(int)
        self.places: dict[str, str] = {}

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()
        self.peaks[phase] = max(self.peaks[phase], torch.cuda.max_memory_allocated())


@cache
def is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def makes_only(func: Any) -> bool:
    """Whether an operation returns new tensors only: neither views nor what it has changed."""
    returns = func._schema.returns
    return bool(returns) and all(str(each.type) == "Tensor" and each.alias_info is None for each in returns)


class Layout(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


def layout(x: Tensor) -> Layout:
    return Layout(x.shape, x.stride(), x.dtype)


class TensorMeter(TorchDispatchMode):
    """Counts the storages that live on one kind of device, from the operations that make them."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.live = 0
        self.known: set[int] = set()
        self.phase = "before"
        self.peaks: dict[str, int] = defaultdict(int)
        self.places: dict[str, str] = {}
        self.layouts: dict[Any, Any] = {}
        self.running: list[str] = []  # modules, the innermost last

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True  # the only values that a story asks for: is everything finite?
        if is_composite(func):
            with self:  # what it makes on its way counts, too
                return func.decompose(*args, **(kwargs or {}))
        result = self.repeated(func, args, kwargs or {}) if makes_only(func) else func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def repeated(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Of a story's operations on "meta", most come again and again, and working out a shape is slow."""
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or not all(x.is_meta for x in tensors):
            return func(*args, **kwargs)
        key = func, structure, *(layout(x) if isinstance(x, Tensor) else (type(x), x) for x in leaves)
        if key not in self.layouts:
            result = func(*args, **kwargs)
            self.layouts[key] = tree_map(layout, result)
            return result
        made = self.layouts[key]
        return made.empty() if isinstance(made, Layout) else type(made)(each.empty() for each in made)

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if x.device.type != self.device or storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.live += storage.nbytes()
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        if self.live > self.peaks[self.phase]:
            self.peaks[self.phase] = self.live
            self.places[self.phase] = self.running[-1] if self.running else ""

    def _drop(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.live -= size

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        self.peaks[phase] = max(self.peaks[phase], self.live)
        yield
        self.phase = before

    @contextmanager
    def naming(self, parts: dict[str, nn.Module]) -> Iterator[None]:
        """Within the block, the running modules are known by their names."""
        names = {m: f"{part}.{name}" for part, whole in parts.items() for name, m in whole.named_modules()}
        before = register_module_forward_pre_hook(lambda module, args: self.running.append(names.get(module, "?")))
        after = register_module_forward_hook(lambda module, args, result: self.running.pop() and None)
        yield
        before.remove()
        after.remove()


class MetaIsGPU(TorchFunctionMode):
    """Tensors without values pass for those of a GPU: Triton kernels, fused attention, copies to the host."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is scaled_dot_product_attention:
            q, v = args[0], args[2]
            out = q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], v.shape[-1]).transpose(-2, -3)
            q.new_empty(q.shape[:-1], dtype=torch.float32)  # log-sum-exp
            return out
        if func is Tensor.is_cuda.__get__:
            return args[0].is_meta
        if func is Tensor.cpu and args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return func(*args, **(kwargs or {}))


@contextmanager
def phases(meter: Meter) -> Iterator[None]:
    """Within the block, the meter knows which part of a story is running."""

    def marked(phase: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with meter.during(phase):
                return function(*args, **kwargs)

        return run

    with (
        patch.object(ConsiStory, "encode_prompts", marked("text encoders", ConsiStory.encode_prompts)),
        patch.object(model, "tell", marked("denoising", model.tell)),
        patch.object(ConsiStory, "decode", marked("decoding", ConsiStory.decode)),
    ):
        yield


def load(device: str, configs: Configs, option: Option) -> ConsiStory:
    """A float16 model of random weights, made as a checkpoint is; for "meta" of arbitrary ones."""
    parts = {name: (configs[name], TensorSource(name, weights(name, configs[name], device))) for name in COMPONENTS}
    schedule = ScheduleConfig.from_json(configs["scheduler"])
    with patch.object(loading, "is_finite", lambda x: True):  # tensors on "meta" have no values
        return ConsiStory._assemble(
            "random", (Tokenizer.clip(), Tokenizer.clip(pad="!")), parts, schedule, configs["model_index"],
            torch.device(device), torch.float16, vae=None, loras=(), offload=option.offload, tile=option.tile,
        )  # fmt: skip


def weights(name: str, config: dict[str, Any], device: str) -> dict[str, Callable[[], Tensor]]:
    with torch.device("meta"):
        shapes = {key: weight.shape for key, weight in BUILDERS[name](config).state_dict().items()}
    noise = 0.02 * torch.randn(2**20)

    def read(shape: torch.Size) -> Tensor:
        if device == "meta":
            return torch.empty(shape, dtype=torch.float16)
        return noise.half().repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape)

    return {key: partial(read, shape) for key, shape in shapes.items()}


def tell(pipe: ConsiStory, images: int, size: int, option: Option) -> None:
    pipe(
        subject="a cat", settings=SETTINGS[:images], steps=STEPS, width=size, height=size, chunk=option.chunk,
        config=CONFIG,
    )  # fmt: skip


def peaks(device: str, configs: Configs, option: Option, images: int, size: int) -> Meter:
    """Of one story, modelled for the device "meta", else measured."""
    pipe = load(device, configs, option)
    if device != "meta":
        measured = AllocatorMeter()
        with phases(measured):
            tell(pipe, images, size, option)
        return measured
    meter = TensorMeter("meta")
    with (
        counting(meter, pipe), phases(meter), meter.naming(parts_of(pipe)), MetaIsGPU(),
        patch.object(triton.JITFunction, "run"), patch.object(ConsiStory, "fingerprint", "of no values"),
    ):  # fmt: skip
        tell(pipe, images, size, option)
    return meter


def parts_of(pipe: ConsiStory) -> dict[str, nn.Module]:
    return dict(zip(COMPONENTS, (pipe.unet, pipe.vae, *pipe.text_encoders), strict=True))


@contextmanager
def counting(meter: TensorMeter, pipe: ConsiStory) -> Iterator[None]:
    """Within the block, the weights count and all that is made."""
    for part in parts_of(pipe).values():
        for weight in part.parameters():
            meter.add(weight)
    with meter:
        yield


def in_gib(meter: Meter) -> dict[str, float]:
    parts = {phase: meter.peaks[phase] / GIB for phase in ("text encoders", "denoising", "decoding")}
    return {"peak": max(parts.values())} | parts


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'GiB':26} {'pictures':>8} {'peak':>6} {'text':>6} {'UNet':>6} {'VAE':>6}   at the peak runs"
    for row in rows:
        figures = " ".join(f"{row[name]:6.2f}" for name in ("peak", "text encoders", "denoising", "decoding"))
        yield f"{row['option']:26} {row['pictures']:8} {figures}   {row['at']}"


# --- is counting right? -----------------------------------------------------------------------------------------------


def compare_countings(size: int) -> dict[str, float]:
    """Peaks in MiB of one story of three `sprites` on the CPU, above what was there before, by three ways to count."""
    pipe = ConsiStory.from_pretrained("sprites")
    story = partial(tell, pipe, 3, size, Option())
    story()  # what is made once and kept is there now
    meter = TensorMeter("cpu")
    with counting(meter, pipe):
        weights = meter.live
        story()
    found = {"counted": max(meter.peaks.values()) - weights, "profiler": profiled(story), "process": growth(story)}
    return {name: value / 2**20 for name, value in found.items()}


def profiled(call: Callable[[], None]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda event: event["ts"])
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]
    return max(event["args"]["Total Allocated"] for event in memory) - before


def growth(call: Callable[[], None]) -> int:
    """Of the process's resident memory, at the most, seen every millisecond. Linux only."""
    seen, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(seen) - seen[0]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def checked(size: int) -> dict[str, float]:
    """`compare_countings` in a process whose freed memory goes back to the system at once."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, __file__, "--check-only", "--size", str(size)]
    return json.loads(subprocess.run(program, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="meta", help="cuda, or meta for a model of it")
    parser.add_argument("--images", type=int, nargs="+", default=[3, 4, 8])
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument(
        "--check", type=int, nargs="+", default=[64, 128], help="pixels, of the stories that are counted in three ways"
    )
    parser.add_argument("--check-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    args = parser.parse_args()
    if args.check_only:
        print(json.dumps(compare_countings(args.size)))
        return

    modelled = args.device == "meta"
    print("modelled" if modelled else "measured by the allocator", f"at {args.size}x{args.size}, float16", flush=True)
    configs = dict(sdxl_configs())
    rows = []
    for name in args.options:
        for images in args.images:
            meter = peaks(args.device, configs, OPTIONS[name], images, args.size)
            place = meter.places.get(max(meter.peaks, key=meter.peaks.__getitem__), "")
            rows.append({"option": name, "pictures": images, **in_gib(meter), "at": place})
            print(*list(table(rows))[-1 if len(rows) > 1 else 0 :], sep="\n", flush=True)
    check = {f"{size}x{size}": checked(size) for size in args.check}
    for size, found in check.items():
        print(f"peak of a story on the CPU, sprites, {size}, MiB:", ", ".join(f"{k} {v:.0f}" for k, v in found.items()))
    about = machine("cpu" if modelled else "cuda") | {
        "peaks": "modelled: tensors of the library on device meta, counted" if modelled else "torch.cuda statistics",
        "dtype": "float16, autoencoder float32", "size": f"{args.size}x{args.size}", "units": "GiB; MiB in the check",
    }  # fmt: skip
    write(args.out, {"about": about, "rows": rows, "check": check})


if __name__ == "__main__":
    main()
