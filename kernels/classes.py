"""What the layers of one chunk share: which rows and keys are text or vision, and which line of a grid each key is on.

Everything is derived once a layout and chunk, on the device and without waiting for it: sizes are known to the host
from the layout's items, contents never are.

Legend: Nq queries of the chunk, Nk keys, C candidate strides, n lines of all candidates and items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from mm_sglang.kernels.layout import TEXT, TokenLayout, VisionItem, upload
from mm_sglang.kernels.plan import PAD, TILE

CLASSES = ("text", "vision")
T = TypeVar("T")


def _once(layout: TokenLayout, key: object, make: Callable[[], T]) -> T:
    if key not in layout.cache:
        layout.cache[key] = make()
    return layout.cache[key]  # type: ignore[no-any-return]


def begun(layout: TokenLayout) -> list[VisionItem]:
    """Items with a token below layout.length; the rest of the prompt's may be still to come."""
    return [item for item in layout.items if item.spans[0][0] < layout.length]


def spans(layout: TokenLayout, name: str, first: int, last: int) -> list[tuple[int, int]]:
    """Half-open ranges of positions of one class inside [first, last), ascending."""
    vision = [(max(a, first), min(b, last)) for item in layout.items for a, b in item.spans if a < last and b > first]
    if name == "vision":
        return vision
    edges = [first, *(edge for span in vision for edge in span), last]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def count(layout: TokenLayout, name: str, first: int, last: int) -> int:
    """Tokens of a class at positions [first, last); known to the host."""
    return _once(layout, ("count", name, first, last), lambda: sum(b - a for a, b in spans(layout, name, first, last)))


def commonest_first(layout: TokenLayout, first: int) -> tuple[str, ...]:
    """The classes that positions from `first` on have, known to the host."""
    number = {name: count(layout, name, first, layout.length) for name in CLASSES}
    return tuple(sorted((name for name in CLASSES if number[name]), key=lambda name: -number[name]))


def positions(layout: TokenLayout, name: str, first: int, last: int) -> torch.Tensor:
    """int32 [count] positions of a class inside [first, last), ascending."""

    def make() -> torch.Tensor:
        return upload(on_host(layout, name, first, last), layout.device)

    return _once(layout, ("positions", name, first, last), make)


def on_host(layout: TokenLayout, name: str, first: int, last: int) -> torch.Tensor:
    """The same on the host, made anew."""
    parts = [torch.arange(a, b, dtype=torch.int32) for a, b in spans(layout, name, first, last)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)


def order(layout: TokenLayout, name: str, first: int, last: int) -> torch.Tensor:
    """The same filled up with PAD to whole tiles, int32 [1, tiles * TILE]."""

    def make() -> torch.Tensor:
        at = positions(layout, name, first, last)
        return torch.nn.functional.pad(at, (0, -len(at) % TILE), value=PAD)[None]

    return _once(layout, ("order", name, first, last), make)


def tail(layout: TokenLayout, queries: int, most: int) -> int:
    """How many of a chunk's last `most` queries are text after all that is shown; known to the host."""
    shown = _once(layout, "shown", lambda: max((b for item in begun(layout) for _, b in item.spans), default=0))
    return max(0, min(most, queries, layout.length - shown))


def is_question(layout: TokenLayout, queries: int, most: int) -> bool:
    """Whether the whole chunk is such a tail, as after a radix hit: every query is to attend every key."""
    return tail(layout, queries, most) == queries


def mask(layout: TokenLayout, name: str) -> torch.Tensor:
    """bool [Nk]: positions of a class."""
    return _once(layout, ("mask", name), lambda: (layout.modality == TEXT) == (name == "text"))


def first(layout: TokenLayout, name: str | None, number: int) -> torch.Tensor:
    """bool [Nk]: positions below `number`, of a class or (None) of any."""

    def make() -> torch.Tensor:
        early = torch.arange(layout.length, device=layout.coordinates.device) < number
        return early if name is None else early & mask(layout, name)

    return _once(layout, ("first", name, number), make)


def segment_of(layout: TokenLayout) -> torch.Tensor:
    """uint8 [Nk]: 1 for text, 2 for vision, the segments of a key order that is split by class."""
    return _once(layout, "segment", lambda: torch.where(mask(layout, "text"), 1, 2).to(torch.uint8))


@dataclass(frozen=True, kw_only=True)
class Stride:
    """A candidate distance between lines: `multiple` rows or frames."""

    unit: str
    multiple: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Lines:
    """Lines (residues of the token's index in its item) of every candidate stride, numbered through.

    Args:
        of: int64 [C, Nk] line of each key; text keys have the number n, which no line has.
        k_pos: int32 [F] sampled keys, from which masses of lines are estimated; sampled: int64 [C * F] their lines.
        table: int64 [C * I, longest] lines of each candidate and item, filled up with n.
        taken: bool [C * I, longest]: that many of the best lines of an item are kept.
        candidate: int64 [C * I].
        share: fp32 [C] share of the vision keys that this keeps.
        bound: no candidate keeps more keys than this.
        number: n.
    """

    of: torch.Tensor
    k_pos: torch.Tensor
    sampled: torch.Tensor
    table: torch.Tensor
    taken: torch.Tensor
    candidate: torch.Tensor
    share: torch.Tensor
    bound: int
    number: int


def lines(layout: TokenLayout, strides: tuple[Stride, ...], per_frame: int, most: int) -> Lines:
    """Lines for a grid that keeps about `per_frame` keys a frame, at least one line, if every row or frame has one.

    A line is a residue of the token's index *inside its item*, so lines stay true where timestamps between frames
    break a constant distance (Qwen2.5-VL, Qwen3-VL) and in each of several videos. At most about `most` keys are
    sampled to estimate their masses.
    """
    return _once(layout, ("lines", strides, per_frame, most), lambda: _lines(layout, strides, per_frame, most))


def _lines(layout: TokenLayout, strides: tuple[Stride, ...], per_frame: int, most: int) -> Lines:
    ids: list[torch.Tensor] = []
    first: list[int] = []
    keep: list[int] = []
    sizes: list[int] = []
    share: list[float] = []
    bound = 0
    cols = upload(torch.tensor([i.cols for i in begun(layout)] or [1], dtype=torch.int32), layout.device)
    frame = upload(torch.tensor([i.frame_tokens for i in begun(layout)] or [1], dtype=torch.int32), layout.device)
    vision, item = mask(layout, "vision"), layout.item.clamp(min=0).long()
    number, total = 0, max(1, count(layout, "vision", 0, layout.length))
    for stride in strides:
        base, kept = [], 0
        for entry in begun(layout):
            unit = entry.cols if stride.unit == "row" else entry.frame_tokens
            size = unit * stride.multiple
            wanted = min(max(1, round(per_frame * unit / entry.frame_tokens)), size)  # multiples keep fewer keys
            base.append(number)
            first.append(number)
            sizes.append(size)
            keep.append(wanted)
            kept += wanted * -(-entry.frames * entry.frame_tokens // size)
            number += size
        bound = max(bound, kept)
        share.append(min(1.0, kept / total))
        begin = upload(torch.tensor(base or [0], dtype=torch.int32), layout.device)[item]
        inside = layout.x if stride.unit == "row" else layout.x + layout.y * cols[item]
        turn = layout.y if stride.unit == "row" else layout.t
        ids.append(begin + inside + turn % stride.multiple * (cols if stride.unit == "row" else frame)[item])
    longest = max(sizes, default=1)
    table = torch.full((max(1, len(sizes)), longest), number)
    for n, (a, size) in enumerate(zip(first, sizes, strict=True)):
        table[n, :size] = torch.arange(a, a + size)
    of = torch.where(vision, torch.stack(ids), number).long()
    k_pos = sample(layout, most)
    candidate = torch.arange(len(table)) // (len(table) // len(strides))
    return Lines(
        of=of, k_pos=k_pos, sampled=of[:, k_pos.long()].flatten(), table=upload(table, layout.device),
        taken=upload(torch.arange(longest) < torch.tensor(keep or [0])[:, None], layout.device),
        candidate=upload(candidate, layout.device), share=upload(torch.tensor(share), layout.device),
        bound=bound, number=number,
    )  # fmt: skip


def sample(layout: TokenLayout, most: int) -> torch.Tensor:
    """int32 ascending positions of at most about `most` vision keys: whole frames, evenly spread over each item."""

    def make() -> torch.Tensor:
        parts = []
        total = max(1, count(layout, "vision", 0, layout.length))
        for item in begun(layout):
            wanted = max(1, min(item.frames, round(most * item.frames / total)))
            frames = torch.linspace(0, item.frames - 1, wanted).round().long().unique_consecutive()  # type: ignore[no-untyped-call]
            at = item.positions().view(item.frames, -1)[frames].flatten()
            parts.append(at[at < layout.length].int())
        return upload(torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32), layout.device)

    return _once(layout, ("sample", most), make)
