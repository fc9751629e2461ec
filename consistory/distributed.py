"""One story drawn by many processes, each with a GPU of its own: `torchrun --nproc-per-node 8 -m consistory ...`.

Every rank runs the anchors along with its share of the other pictures. That is never slower than to run the anchors
once, to send what the others need of them, and then to draw the shares: with c seconds a picture, A anchors, E extras
and R ranks, each rank is busy for (A + E / R) c seconds; the other way takes A c, then the sending, then E / R c. (At
1024 pixels, keys and values of two anchors are about a gigabyte a step.) Nor does a rank wait for others at any step:
they agree on who draws what, and meet again when all is drawn.

What they exchange lies on the host, so it all goes through gloo, also where pictures are drawn on GPUs. Gloo notices at
once that a process is gone, and does not mind how long another one draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from consistory.weights.errors import ConsistoryError

from .correspondence import Nearest
from .images import Choose, Record, every_picture
from .model import Story

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # how long a rank waits for others that are alive and draw


class SharedError(ConsistoryError):
    """The same error on every rank."""


@dataclass(frozen=True)
class Ranks:
    """The processes that draw together: this one is number `rank` of `size`. By default it is alone.

    local: its number among those on the same machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    group: dist.ProcessGroup | None = None

    def gather(self, x: Any) -> list[Any]:
        """What each rank brings, in their order, on every rank. Raises ConsistoryError if one is gone."""
        if self.size == 1:
            return [x]
        brought = [None] * self.size
        try:
            dist.all_gather_object(brought, x, self.group)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConsistoryError(f"another rank stopped early ({reason}): see its output") from None
        return brought

    def agree(self, x: T | ConsistoryError) -> T:
        """The first rank's x, on every rank. Raises SharedError, on every rank, if one of them brings an error."""
        brought = self.gather(x)
        for error in brought:
            if isinstance(error, ConsistoryError):
                raise SharedError(str(error))
        return brought[0]


@contextmanager
def torchrun_ranks() -> Iterator[Ranks]:
    """The processes that torchrun has started, connected while the block runs."""
    dist.init_process_group("gloo")
    try:
        with default_ranks() as ranks:
            yield ranks
    finally:
        dist.destroy_process_group()


@contextmanager
def default_ranks() -> Iterator[Ranks]:
    """Those of torch's default process group, of any backend."""
    group = dist.new_group(timeout=PATIENCE, backend="gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.get_node_local_rank(fallback_rank=0), group)
    finally:
        dist.destroy_process_group(group)


def draw_on_ranks(
    draw: Callable[..., Story],
    /,
    *arguments: Any,
    ranks: Ranks | None = None,
    choose: Choose = every_picture,
    **options: Any,
) -> Story:
    """The whole story, on every rank; each has drawn a share of it.

        torch.distributed.init_process_group()
        pipe = ConsiStory.from_pretrained(..., device=f"cuda:{os.environ['LOCAL_RANK']}")
        story = draw_on_ranks(pipe, subject="a cat", settings=[...])
        more = draw_on_ranks(story.subject.extend, ["in space", "in a meadow"])

    All ranks give the same arguments, those of `draw`; callbacks hear of the rank's own share. A file to `record` to is
    written by the first rank.
    ranks: by default those of torch's default process group.
    choose: as for a story; the first rank's answer is shared out, so that shares differ by one extra at most.

    The pictures are those that one process would draw, up to rounding. Raises SharedError, on every rank, for what any
    of them meets before it draws; for what a rank meets later, ConsistoryError on that rank, and on the others as soon
    as it is gone and they have drawn their shares.
    """
    if ranks is None:
        with default_ranks() as all_ranks:
            return draw_on_ranks(draw, *arguments, ranks=all_ranks, choose=choose, **options)
    rank, size = ranks.rank, ranks.size
    if rank > 0:
        options.pop("record", None)
    agreed = False

    def choose_share(record: Record) -> Sequence[int]:
        nonlocal agreed
        pictures = choose(record)
        agreed = True
        return sorted(ranks.agree(pictures))[rank::size]

    try:
        share = draw(*arguments, choose=choose_share, **options)
    except ConsistoryError as error:
        if agreed:
            raise
        return ranks.agree(error)
    return share if size == 1 else put_together(share, ranks)


def put_together(share: Story, ranks: Ranks) -> Story:
    """The whole story of every rank's share. Of its pictures 0, 1, 2, ..., rank r has drawn r, r + size, ..."""
    fields = ("images", "prompts", "seeds", "latents", "masks", "nearest")
    sent = moved({name: getattr(share, name) for name in fields} | {"subject": dict(share.subject.masks)}, "cpu")
    shares = moved(ranks.gather(sent), share.subject.pipe.device)
    # A rank that had nothing to draw did not run the anchors.
    subject = replace(share.subject, masks=max((fields.pop("subject") for fields in shares), key=len))
    stories = [replace(share, subject=subject, **fields) for fields in shares]
    # One rank's pictures after the other's: picture i is number i // size of rank i % size.
    before = [0, *accumulate(len(story.prompts) for story in stories)]
    order = [before[i % ranks.size] + i // ranks.size for i in range(before[-1])]
    return stories[0].join(stories[1:]).select(order)


def moved(x: Any, device: str | torch.device) -> Any:
    """The same, with every tensor in it on a device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Nearest):
        return Nearest(x.index.to(device), x.distance.to(device))
    if isinstance(x, dict):
        return {key: moved(value, device) for key, value in x.items()}
    if isinstance(x, list):
        return [moved(value, device) for value in x]
    return x
