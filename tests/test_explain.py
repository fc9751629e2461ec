"""What is noted while a story is told, and the page that shows it; in a browser too where chromium is installed."""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import re
import shutil
import subprocess
import textwrap
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity import randn
from PIL import Image
from torch import Tensor

from consistory import ConsiStory, ConsistoryConfig, ConsistoryError, ddim
from consistory.cli import main
from consistory.correspondence import Nearest
from consistory.explain import LatentColours, Note, RunningMean, Trace, pool_reading
from consistory.injection import plan_injection
from consistory.kernels.extended_attention import reference
from consistory.model import Story
from consistory.sdsa import Consistent
from consistory.story import Plan, State

PROMPTS = ["a photo of a cute dog sitting on the beach", "a watercolor of a fluffy dog, by night", "a dog in space"]
CALL: dict[str, Any] = {"prompts": PROMPTS, "concepts": ["dog"], "steps": 10, "width": 128, "height": 192}
VANILLA = ConsistoryConfig.vanilla()
PANELS = ["run", "masks", "attention", "dropout", "blending", "matches", "injection", "time"]
BUDGET = 10_000_000  # bytes of a page of four pictures


class Listener(Trace):
    """Keeps, beside the notes, what they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[tuple[Tensor, Tensor, Consistent]]] = {}
        self.states: list[tuple[State, State]] = []

    def control(self, plan: Plan, state: State, control: Consistent) -> Any:
        self.seen[state.step] = self.now = []
        return super().control(plan, state, control)

    def _read(self, plan: Plan, q: Tensor, k: Tensor, control: Consistent) -> Tensor:
        self.now.append((q, k, control))
        return super()._read(plan, q, k, control)

    def step(self, plan: Plan, before: State, after: State, output: Tensor) -> None:
        self.states.append((before, after))
        super().step(plan, before, after, output)


@pytest.fixture(scope="module")
def pipe(golden_weights: Path) -> ConsiStory:
    return ConsiStory.from_pretrained(golden_weights)


@pytest.fixture(scope="module")
def watched(pipe: ConsiStory) -> tuple[Listener, Story]:
    trace = Listener()
    return trace, pipe(**CALL, observer=trace)


class Page(HTMLParser):
    """A page, read: tags that are open, ids, text of elements that are asked for, addresses of anything."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: dict[str, str] = {}
        self.addresses: list[str] = []
        self.code: list[str] = []
        self.listings: list[str] = []
        self.scripts: dict[str, str] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.addresses += [value or "" for key, value in attributes if key in ("src", "href", "srcset", "action")]
        self.id = values.get("id")
        if self.id:
            assert self.id not in self.ids, "an id is unique"
            self.ids[self.id] = tag
        if tag not in ("meta", "link", "br", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "code":
            self.code.append(data)
        if self.open and self.open[-1] == "pre":
            self.listings.append(data)
        if self.open and self.open[-1] == "script":
            self.scripts[self.id or ""] = data


def read_arrays(page: Page) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    facts = json.loads(page.scripts["facts"], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    data = zlib.decompress(base64.b64decode(page.scripts["arrays"]))
    arrays = {
        name: np.frombuffer(data, f"<u{at['size']}", int(np.prod(at["shape"])), at["offset"]).reshape(at["shape"])
        for name, at in facts["arrays"].items()
    }
    return facts, arrays


# --- the notes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ConsistoryConfig(), VANILLA], ids=["default", "vanilla"])
def test_looking_changes_nothing(pipe: ConsiStory, config: ConsistoryConfig) -> None:
    seen, unseen = pipe(**CALL, config=config, observer=Trace()), pipe(**CALL, config=config)
    assert torch.equal(seen.latents, unseen.latents)


def test_looking_leaves_a_recording_as_it_is(pipe: ConsiStory, tmp_path: Path) -> None:
    files = tmp_path / "seen.safetensors", tmp_path / "unseen.safetensors"
    pipe(**CALL, record=files[0], observer=Trace())
    pipe(**CALL, record=files[1])
    assert files[0].read_bytes() == files[1].read_bytes()


def test_readings_are_the_attention_that_the_operator_computes(watched: tuple[Listener, Story]) -> None:
    """The definition of the operator, with values that tell the keys apart, returns the probabilities."""
    trace, _ = watched
    assert list(trace.notes.readings) == [1, 3, 6]
    for step, reading in trace.notes.readings.items():
        expected = []
        for q, k, control in trace.seen[step]:
            assert control.sharing is not None
            key_mask = control.sharing.key_masks[trace.notes.plan.unet.strides[-1]]  # type: ignore[union-attr]
            (images, heads, patches, _), anchors = q.shape, len(key_mask)
            values = torch.eye((1 + anchors) * patches).unflatten(0, (1 + anchors, patches))
            own = values[0].expand(1, images, heads, -1, -1)
            shared = values[1:, None].expand(1, anchors, heads, patches, -1)
            probabilities = reference.extended_attention(
                q[None], k[None], own, k[None, :anchors], shared, key_mask, control.sharing.share
            )[0].mean(1)
            expected.append(probabilities.unflatten(-1, (1 + anchors, patches)))
        torch.testing.assert_close(reading.mean, torch.stack(expected).mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(reading.mean.sum((-2, -1)), torch.ones(reading.mean.shape[:2]))
        assert not reading.mean[0, :, 1].any() and not reading.mean[1, :, 2].any(), "an anchor reads itself once"
        assert reading.mean[2, :, 1:].sum(-1).gt(0).all()


def test_predictions_are_what_two_states_imply(watched: tuple[Listener, Story]) -> None:
    """A DDIM step moves in the plane of the prediction and the noise, so two states give both."""
    trace, _ = watched
    plan = trace.notes.plan
    assert plan is not None
    bars = ddim.alpha_bars(plan.schedule)
    notes = [note for notes in trace.notes.passes for note in notes]
    assert [before.step for before, _ in trace.states] == [note.step for note in notes]
    for note, (before, after) in zip(notes, trace.states, strict=True):
        t = plan.timesteps[note.step]
        bar, bar_next = bars[t], ddim.alpha_bar_after(plan.schedule, plan.steps, t)
        matrix = torch.stack([bar.sqrt(), (1 - bar).sqrt(), bar_next.sqrt(), (1 - bar_next).sqrt()]).view(2, 2).double()
        x0, _ = torch.einsum("ij,jnchw->inchw", matrix.inverse(), torch.stack([before.x, after.x]).double())
        torch.testing.assert_close(note.x0.double(), x0, atol=0.01 * x0.abs().max().item(), rtol=0)


def test_passes_masks_and_stages(watched: tuple[Listener, Story]) -> None:
    trace, story = watched
    first, second = trace.notes.passes
    assert [note.step for note in first] == [*range(7)]  # t = 301 is the nearest to 261
    assert [note.step for note in second] == [*range(1, 10)]
    assert first[0].masks is None and all(note.masks is not None for note in [*first[1:], *second])
    for stride, mask in story.masks.items():
        assert first[1].masks is not None and second[0].masks is not None
        assert torch.equal(first[1].masks[stride], second[0].masks[stride])
        assert first[-1].masks is not None and (first[-1].masks[stride] == mask).float().mean() > 0.8
    names = [name for name, _ in trace.notes.stages]
    assert names == ["prompts", "first pass", "correspondence", "second pass", "pictures", "done"]
    times = [start for _, start in trace.notes.stages]
    assert times == sorted(times)


def test_pulls_are_where_queries_are_blended(pipe: ConsiStory, watched: tuple[Listener, Story]) -> None:
    trace, _ = watched
    pulls = {step: pull for step, pull in trace.notes.pulls.items() if pull.count}
    assert list(pulls) == [1]  # of 10 steps, 0 and 1 are blended, and nothing is shared at 0
    assert pulls[1].mean.shape == (3, 6 * 4)
    assert pulls[1].mean.min() > -1e-6 and pulls[1].mean.max() > 1e-3


def test_the_next_story_replaces_the_notes(pipe: ConsiStory) -> None:
    trace = Trace()
    for _ in range(2):
        story = pipe(**(CALL | {"steps": 2}), observer=trace)
    assert [len(notes) for notes in trace.notes.passes] == [1, 2]
    assert trace.page(story)


def test_a_trace_without_a_story_says_what_to_do(watched: tuple[Listener, Story]) -> None:
    with pytest.raises(ConsistoryError, match=r"observer=trace"):
        Trace().page(watched[1])


@pytest.mark.parametrize("size, factor", [((6, 4), 1), ((6, 4), 2), ((5, 7), 2), ((5, 7), 3), ((5, 7), 7)], ids=str)
def test_pooling_keeps_all_attention(size: tuple[int, int], factor: int) -> None:
    h, w = size
    read = randn(h * w, 3 * h * w).softmax(-1).unflatten(-1, (3, h * w))
    pooled = pool_reading(read, size, factor)
    torch.testing.assert_close(pooled.sum((1, 2)), torch.ones(len(pooled)))
    rows, columns = range(0, h, factor), range(0, w, factor)
    grid = read.view(h, w, 3, h, w)
    for i, (r, c) in enumerate((r, c) for r in rows for c in columns):
        block = grid[r : r + factor, c : c + factor].flatten(0, 1).mean(0)
        for j, (y, x) in enumerate((y, x) for y in rows for x in columns):
            torch.testing.assert_close(pooled[i, :, j], block[:, y : y + factor, x : x + factor].sum((1, 2)))


def test_colours_of_latents_are_fitted() -> None:
    latents = randn(2, 4, 8, 6)
    true = torch.tensor([[20.0, 5, 1], [3, 18, 2], [1, 2, 15], [6, 6, 6], [128, 120, 110]])
    colours = torch.cat([latents, torch.ones(2, 1, 8, 6)], 1).movedim(1, -1) @ true
    images = colours.clamp(0, 255).round().to(torch.uint8).repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()
    fitted = LatentColours.fit(latents, images)
    torch.testing.assert_close(fitted.weights, true, atol=0.5, rtol=0)
    assert np.abs(fitted(latents).astype(int) - images[:, ::4, ::4]).max() <= 2
    assert fitted(randn(1, 4, 256, 300)).shape == (1, 256 // 3, 100, 3)


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(watched: tuple[Listener, Story]) -> str:
    return watched[0].page(watched[1])


def test_the_page_has_every_panel(page: str) -> None:
    read = Page(page)
    assert not read.open, "every element is closed"
    assert [id for id, tag in read.ids.items() if tag == "section"] == PANELS
    equations = re.findall(r"<small>(eqs?\. [\d–]+)</small>", page)
    assert equations == ["eq. 7", "eqs. 2–3", "eq. 4", "eqs. 8–9", "eqs. 5–6"]


def test_the_page_holds_the_code_that_it_names(page: str) -> None:
    read = Page(page)
    assert len(read.code) == len(read.listings) >= 8
    for (path, name), listing in zip((code.split(": ") for code in read.code), read.listings, strict=True):
        module = path.removesuffix(".py").replace("/", ".").replace("kernels.", "consistory.kernels.")
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
        assert callable(value) and listing == textwrap.dedent(inspect.getsource(value)).rstrip()


def test_the_page_needs_nothing_else(page: str) -> None:
    assert "http:" not in page and "https:" not in page and "url(" not in page
    assert all(address.startswith(("#", "data:")) for address in Page(page).addresses)
    assert "default-src 'none'" in page


def test_the_page_holds_what_was_noted(page: str, watched: tuple[Listener, Story]) -> None:
    trace, story = watched
    facts, arrays = read_arrays(Page(page))
    assert facts["prompts"] == PROMPTS and facts["anchors"] == 2 and len(facts["pictures"]) == 3
    assert facts["fine"] == [12, 8] and facts["coarse"] == [6, 4] and facts["injection"] == [1, 3]
    assert [len(p["frames"]) for p in facts["passes"]] == [7, 9]
    assert np.array_equal(arrays["match_index"], story.nearest[2].index)
    assert np.array_equal(arrays["match_mask"], story.masks[2])
    injection = plan_injection(story.nearest[2], story.masks[2], 0.8)
    assert np.array_equal(arrays["match_injected"], injection.mask)
    finite = story.nearest[2].distance.isfinite()
    distance = torch.from_numpy(arrays["match_distance"].copy()) / 255 * facts["matches"]["largest"]
    close = (distance - story.nearest[2].distance).abs()[finite] <= facts["matches"]["largest"] / 255
    nearest = story.nearest[2].distance <= facts["matches"]["largest"]
    assert close[nearest[finite]].all()
    note = trace.notes.passes[1][4]
    assert note.masks is not None
    assert np.array_equal(arrays["pass1_fine"][4], note.masks[2])
    read = trace.notes.readings[6].mean
    assert arrays["reading"].shape == (3, *read.shape)
    expected = (read / read.amax((-2, -1), keepdim=True)).sqrt() * 255
    assert np.abs(arrays["reading"][2] - expected.numpy()).max() <= 0.51


def test_words_of_a_prompt_do_not_break_the_page(pipe: ConsiStory) -> None:
    trace = Trace()
    prompts = ["a dog </script><b>", "a dog __ARRAYS__ & __FACTS__ <!--"]
    story = pipe(**(CALL | {"prompts": prompts, "steps": 2}), observer=trace)
    facts, _ = read_arrays(Page(trace.page(story)))
    assert facts["prompts"] == prompts


@pytest.mark.parametrize("options", [{"chunk": 1, "anchors": 1}, {"choose": lambda record: [2]}])
def test_a_part_of_a_story_has_no_page(pipe: ConsiStory, options: dict[str, Any]) -> None:
    trace = Trace()
    story = pipe(**(CALL | {"steps": 1} | options), observer=trace)
    with pytest.raises(ConsistoryError, match="without chunk and choose"):
        trace.page(story)


def test_another_story_has_no_page(pipe: ConsiStory) -> None:
    trace = Trace()
    call = CALL | {"steps": 1}
    story = pipe(**call, observer=trace)
    with pytest.raises(ConsistoryError, match="has watched another story"):
        trace.page(pipe(**call, seed=9))
    assert trace.page(story)


def smooth_noise(*shape: int, seed: int) -> Tensor:
    """Detail at every scale, as a photograph has, 0 to 1. shape: [N, C, h, w]."""
    n, c, h, w = shape
    layers = [
        torch.nn.functional.interpolate(randn(n, c, 2**k, 2**k, seed=seed + k), (h, w), mode="bilinear") / 2**k
        for k in range(1, 9)
    ]
    return (sum(layers[1:], layers[0]) / 3 + 0.5).clamp(0, 1)


def test_a_page_of_four_sdxl_pictures_is_under_ten_megabytes(watched: tuple[Listener, Story]) -> None:
    """50 steps at 1024 pixels, with notes that compress no better than real ones."""
    _, small = watched
    trace = Trace()
    assert watched[0].notes.plan is not None
    trace.notes.plan = replace(
        watched[0].notes.plan, token_weights=torch.zeros(4, 77, 1), steps=50, latent_size=(128, 128)
    )
    x0 = smooth_noise(4, 4, 128, 128, seed=0).half()
    trace.notes.latents = x0.float()
    masks = {s: smooth_noise(1, 4, 128 // s, 128 // s, seed=s)[0].flatten(1) > 0.5 for s in (2, 4)}
    cross_map = smooth_noise(1, 4, 32, 32, seed=7)[0].flatten(1)
    for steps in (range(37), range(5, 50)):
        noisy = [x0 + 0.1 * randn(*x0.shape, seed=step) for step in steps]
        trace.notes.passes.append([Note(step, x, masks, cross_map) for step, x in zip(steps, noisy, strict=True)])
    for step in (1, 5, 16, 33):
        read = (2 * randn(4, 256, 3 * 256, seed=step)).softmax(-1)
        trace.notes.readings[step] = RunningMean(read.unflatten(-1, (3, 256)), 1)
    images = (smooth_noise(4, 3, 1024, 1024, seed=3) * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    nearest = {s: Nearest(torch.randint(p, (4, 2, p)), torch.rand(4, 2, p)) for s, p in ((2, 4096), (4, 1024))}
    story = Story(
        images, [*PROMPTS, "a dog"], ["dog"], [0, 1, 2, 3], small.settings, x0.float(), masks, nearest, small.subject
    )
    page = trace.page(story)
    print(f"{len(page) / 1e6:.1f} MB")
    assert len(page) <= BUDGET
    facts, arrays = read_arrays(Page(page))
    assert arrays["reading"].shape == (4, 4, 256, 3, 256)
    assert len(facts["passes"][1]["frames"]) == 45


def test_the_command_writes_the_page(tmp_path: Path, golden_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["a dog", "--settings", "on the beach", "in the snow", "--steps", "2", "--width", "64", "--height", "64"]
    assert main([*command, "--model", str(golden_weights), "--explain", "--out", str(tmp_path)]) == 0
    assert f"in a browser, {tmp_path / 'story.html'}" in capsys.readouterr().out
    facts, _ = read_arrays(Page((tmp_path / "story.html").read_text("utf-8")))
    assert facts["subject"] == "a dog" and facts["images"] == 2


# --- in a browser -----------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--v=0", "--dump-dom",
]
COLLECT = """<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("unhandledrejection", event => errors.push(`${event.reason}`));
addEventListener("securitypolicyviolation", event => errors.push(event.blockedURI));
</script>"""
# The document is dumped once it is loaded, which the open frame puts off until the report is written. (Virtual time
# runs ahead of the pictures, which are decoded in other threads.)
ACT = """<script>
const pending = document.body.appendChild(document.createElement("iframe"));
pending.hidden = true;
pending.contentDocument.open();
(async () => {
  const moment = milliseconds => new Promise(resolve => setTimeout(resolve, milliseconds));
  const said = () => [...document.querySelectorAll("output")].map(x => x.textContent);
  const drawn = async () => {  // every picture asked for is there; some are asked for after others
    for (let known = -1; known !== loaded.size; await moment(50)) {
      known = loaded.size;
      await Promise.all(loaded.values());
    }
  };

  const {dataset} = document.documentElement;
  for (let waited = 0; waited < 1200 && !dataset.ready && !errors.length; waited++) await moment(50);
  await drawn();
  __WHAT__
})().finally(() => pending.contentDocument.close());
</script>"""
USE = """
  const before = said();
  for (const control of document.querySelectorAll("input[type=radio], input[type=checkbox]")) control.click();
  for (const bar of document.querySelectorAll("input[type=range]")) {
    bar.value = bar.min;
    bar.dispatchEvent(new Event("input"));
  }
  for (const picker of document.querySelectorAll("canvas[tabindex]")) {
    for (const key of ["ArrowLeft", "ArrowUp", "ArrowUp", "End", "PageDown", "ArrowRight", "Home"]) {
      picker.dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true}));
    }
    const box = picker.getBoundingClientRect();
    picker.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 9, clientY: box.top + 9, buttons: 1}));
  }
  await drawn();
  document.body.dataset.report = JSON.stringify({
    errors, before, after: said(), ready: dataset.ready,
    panels: Object.fromEntries([...document.querySelectorAll(".panel")].map(x => [x.parentNode.id, x.textContent])),
    unlabelled: [...document.querySelectorAll("canvas, img")]
      .filter(x => !x.closest("[hidden]") && !x.getAttribute("aria-label") && !x.getAttribute("alt")).length,
    pickers: [...document.querySelectorAll("canvas[tabindex]")].map(x => x.getAttribute("aria-valuetext")),
    wide: document.documentElement.scrollWidth - innerWidth,
    black: [...document.querySelectorAll("canvas")].filter(x => !x.closest("[hidden]") &&
      !x.getContext("2d").getImageData(0, 0, x.width, x.height).data.some((v, i) => i % 4 < 3 && v > 40)).length,
  });
"""
LOOK = """
  const boxes = selector => [...document.querySelectorAll(selector)].filter(x => !x.closest("[hidden]")).map(x => {
    const {left, top, width, height} = x.getBoundingClientRect();
    return [left, top, left + width, top + height];
  });
  document.body.dataset.report = JSON.stringify({
    errors, pictures: boxes("#pictures img"), canvases: boxes("canvas"), height: document.body.scrollHeight,
  });
"""


def browse(page: str, folder: Path, act: str = USE, width: int = 1200, height: int = 900) -> dict[str, Any]:
    """Open a page, do something in it that leaves a report, and leave a screenshot, `page.png`."""
    if BROWSER is None:
        pytest.skip("no chromium is installed: the page is not rendered")
    file = folder / "page.html"
    act = ACT.replace("__WHAT__", act)
    file.write_text(page.replace("<head>", f"<head>{COLLECT}").replace("</body>", f"{act}</body>"), "utf-8")
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--window-size={width},{height}", f"--user-data-dir={folder / 'profile'}",
         f"--screenshot={folder / 'page.png'}", file.as_uri()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    (report,) = re.findall(r'data-report="([^"]*)"', done.stdout)
    return json.loads(report.replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def test_the_page_works_in_a_browser(page: str, tmp_path: Path) -> None:
    report = browse(page, tmp_path)
    assert report["errors"] == [] and report["ready"] == "yes"
    assert report["unlabelled"] == 0 and report["black"] == 0 and report["wide"] <= 0
    assert len(report["before"]) == 6 and all(report["before"])
    changed = [x != y for x, y in zip(report["before"], report["after"], strict=True)]
    # Blending has one step only, and the last picture clicked in the last panel is the one it started with.
    assert changed == [True, True, True, False, True, False]
    assert report["pickers"] == ["row 1, column 4", "row 1, column 8"]
    for panel, text in report["panels"].items():
        assert "undefined" not in text and "NaN" not in text, panel


def coarse(picture: Image.Image) -> NDArray[np.float64]:
    return np.asarray(picture.resize((8, 12), Image.Resampling.BOX), float)


def test_a_screenshot_shows_the_pictures(page: str, watched: tuple[Listener, Story], tmp_path: Path) -> None:
    """Seen, not only there: each picture where it should be, and something in every drawing."""
    report = browse(page, tmp_path, LOOK, height=9000)
    seen = Image.open(tmp_path / "page.png").convert("RGB")
    assert report["errors"] == [] and report["height"] <= seen.height
    assert seen.getpixel((2, 2)) == (0xF7, 0xF6, 0xF3), "the page's own background"
    pictures = [coarse(Image.fromarray(picture)) for picture in watched[1].images]
    shown = [coarse(seen.crop(tuple(map(round, box)))) for box in report["pictures"]]
    assert len(shown) == len(pictures)
    apart = [[np.abs(x - y).mean() for x in pictures] for y in shown]
    for i, differences in enumerate(apart):
        assert differences[i] < 4 and all(other > 8 for j, other in enumerate(differences) if j != i), apart
    assert len(report["canvases"]) >= 15
    for box in report["canvases"]:
        assert np.asarray(seen.crop(tuple(map(round, box)))).std() > 5, "a drawing is empty"


VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {"config": VANILLA},
    "vanilla without a concept": {"config": VANILLA, "concepts": None},
    "no injection": {"config": ConsistoryConfig(injection=False)},
    "no sharing": {"config": ConsistoryConfig(sdsa=False)},
    "no dropout, blending or mask": {"config": ConsistoryConfig(dropout=0.0, query_blend=None, masking=False)},
    "one step": {"steps": 1},
    "one picture": {"prompts": PROMPTS[:1]},
    "one anchor": {"anchors": 1},
    "all anchors": {"anchors": 3},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_story_has_a_page(pipe: ConsiStory, name: str, tmp_path: Path) -> None:
    trace = Trace()
    page = trace.page(pipe(**(CALL | {"steps": 4} | VARIANTS[name]), observer=trace))
    read_arrays(Page(page))
    report = browse(page, tmp_path, width=500)
    assert report["errors"] == [] and report["ready"] == "yes"
    assert report["unlabelled"] == 0 and report["wide"] <= 0
    for panel, text in report["panels"].items():
        assert text and "undefined" not in text and "NaN" not in text, panel
