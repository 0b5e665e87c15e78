"""TokenLayout: what every position of a request is. mm_sglang/layout.py builds it from SGLang or Hugging Face.

Legend: N positions of a request, n vision tokens of one item.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

TEXT, IMAGE, VIDEO = 0, 1, 2
MODALITIES = ("text", "image", "video")


def upload(host: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor on `device`, copied without making the host wait."""
    return host.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else host.to(device)


@dataclass(frozen=True, kw_only=True)
class VisionItem:
    """One image or video of a prompt.

    The item's tokens, in order, fill `spans` one after the other; token i is frame i // (rows * cols), then row, then
    column. So one rule covers Qwen2.5-VL (a video is one span) and Qwen3-VL (a span a frame, timestamps between).

    Args:
        modality: IMAGE or VIDEO.
        frames, rows, cols: grid of language-model tokens (after temporal patching and spatial merging).
        spans: half-open [start, end) position ranges of the prompt, ascending, `frames * rows * cols` long in all.
        seconds_per_frame: time between two of those frames, where the model states it.
    """

    modality: int
    frames: int
    rows: int
    cols: int
    spans: tuple[tuple[int, int], ...]
    seconds_per_frame: float | None = None

    def __post_init__(self) -> None:
        if self.modality not in (IMAGE, VIDEO):
            raise ValueError(f"modality={self.modality}: needs {IMAGE} (image) or {VIDEO} (video)")
        last = 0
        for start, end in self.spans:
            if start < last or end <= start:
                raise ValueError(f"spans={self.spans}: needs ascending, non-empty, disjoint [start, end) ranges")
            last = end
        tokens, need = sum(e - s for s, e in self.spans), self.frames * self.rows * self.cols
        if tokens != need or need == 0:
            raise ValueError(
                f"spans hold {tokens} tokens, but a grid of {self.frames} frames x {self.rows} rows x {self.cols} "
                f"columns needs {need}"
            )

    @property
    def frame_tokens(self) -> int:
        return self.rows * self.cols

    def positions(self) -> torch.Tensor:
        """Position of each of the item's tokens, int64 [n]."""
        starts = torch.tensor([s for s, _ in self.spans])
        lengths = torch.tensor([e - s for s, e in self.spans])
        before = torch.cumsum(lengths, 0) - lengths
        return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - before, lengths)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLayout:
    """Modality and grid coordinates of positions [0, length) of one request; what no item covers is text.

    `length` may end anywhere, inside a frame too: a chunked prefill sees the keys written so far and no more.
    """

    items: tuple[VisionItem, ...]
    length: int
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        end = 0
        for item in self.items:
            if item.spans[0][0] < end:
                raise ValueError(f"items overlap or are not in prompt order at position {item.spans[0][0]}")
            end = item.spans[-1][1]
        if self.length < 0:
            raise ValueError(f"length={self.length}: needs 0 or more positions")

    @cached_property
    def coordinates(self) -> torch.Tensor:
        """int32 [5, length]: modality, item (in prompt order), frame t, row y, column x; -1 for text but modality 0."""
        out = torch.full((5, self.length), -1, dtype=torch.int32)
        out[0] = TEXT
        for number, item in enumerate(self.items):
            at = item.positions()
            at = at[at < self.length]
            index = torch.arange(len(at))
            out[0, at] = item.modality
            out[1, at] = number
            out[2, at] = (index // item.frame_tokens).int()
            out[3, at] = (index // item.cols % item.rows).int()
            out[4, at] = (index % item.cols).int()
        return upload(out, self.device)

    def until(self, length: int) -> TokenLayout:
        """The layout of positions [0, length), shorter or longer than this one, without computing anything again."""
        part = TokenLayout(items=self.items, length=length, device=self.device)
        coordinates = self.coordinates[:, :length]
        if length > self.length:
            text = coordinates.new_full((5, length - self.length), -1)
            text[0] = TEXT
            coordinates = torch.cat([coordinates, text], 1)
        part.__dict__["coordinates"] = coordinates  # where cached_property would keep it
        return part

    @cached_property
    def cache(self) -> dict[Any, Any]:
        """What kernels/classes.py derives from this layout, kept so that every layer of a chunk shares it."""
        return {}

    @property
    def modality(self) -> torch.Tensor:
        return self.coordinates[0]

    @property
    def item(self) -> torch.Tensor:
        return self.coordinates[1]

    @property
    def t(self) -> torch.Tensor:
        return self.coordinates[2]

    @property
    def y(self) -> torch.Tensor:
        return self.coordinates[3]

    @property
    def x(self) -> torch.Tensor:
        return self.coordinates[4]

    def counts(self) -> dict[str, int]:
        """Tokens by modality name, zero ones included."""
        number = torch.bincount(self.modality.long(), minlength=len(MODALITIES)).tolist()
        return dict(zip(MODALITIES, number, strict=True))

    def frame_starts(self) -> list[int]:
        """Positions below `length` at which a frame of a video (or an image) begins; for pictures and tests."""
        return sorted(
            int(p) for item in self.items for p in item.positions()[:: item.frame_tokens].tolist() if p < self.length
        )


def consume_grids(
    modality: int,
    grids: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    merge: int,
    seconds_per_frame: Sequence[float] | None = None,
) -> list[VisionItem]:
    """Hand out `spans`, in order, to the images or videos of `grids`, whose token counts say how much each one takes.

    Args:
        modality: IMAGE or VIDEO.
        grids: (t, h, w) of each item in patches, as `image_grid_thw` / `video_grid_thw` give them.
        spans: half-open ranges of vision tokens in prompt order; one item may own several (Qwen3-VL's frames) and
            one range may hold several items (images with no text between).
        merge: spatial merge size; an item has t * (h / merge) * (w / merge) tokens.
        seconds_per_frame: one number an item, if known.

    Raises:
        ValueError: grids and spans do not describe the same number of tokens.
    """
    items: list[VisionItem] = []
    left = deque(spans)
    for number, (t, h, w) in enumerate(grids):
        if h % merge or w % merge:
            raise ValueError(f"grid {(t, h, w)}: height and width need to be multiples of the merge size {merge}")
        need, own = t * (h // merge) * (w // merge), []
        while need and left:
            start, end = left.popleft()
            take = min(need, end - start)
            own.append((start, start + take))
            need -= take
            if start + take < end:
                left.appendleft((start + take, end))
        if need:
            raise ValueError(f"grid {(t, h, w)} of {MODALITIES[modality]} {number}: its spans are {need} tokens short")
        seconds = None if seconds_per_frame is None else float(seconds_per_frame[number])
        items.append(
            VisionItem(
                modality=modality,
                frames=t,
                rows=h // merge,
                cols=w // merge,
                spans=tuple(own),
                seconds_per_frame=seconds,
            )
        )
    if left:
        over = sum(e - s for s, e in left)
        raise ValueError(
            f"{over} {MODALITIES[modality]} tokens at {left[0][0]}.. belong to none of the {len(grids)} grids"
        )
    return items
