"""TokenLayout from SGLang's `mm_inputs` and from a Hugging Face processor's output.

In SGLang this is read in `init_forward_metadata` only: mm_utils sets `forward_batch.mm_inputs` to None when the vision
embeddings are merged, before the first layer runs (managers/mm_utils.py, `general_mm_embed_routine`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from mm_sglang.config import AssumedVideo
from mm_sglang.kernels.layout import IMAGE, VIDEO, TokenLayout, VisionItem, consume_grids

# Architectures whose vision tokens were checked to lie as `consume_grids` says (tests/test_layout.py, tests/e2e).
KNOWN_ARCHITECTURES = ("Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration")


def require_known_architecture(architectures: Sequence[str] | None) -> str:
    """The architecture's name, or ValueError saying which ones have a layout rule."""
    for name in architectures or ():
        if name in KNOWN_ARCHITECTURES:
            return name
    raise ValueError(
        f"no token layout rule for architecture {list(architectures or [])}: needs one of {KNOWN_ARCHITECTURES}"
    )


def _rows(value: Any) -> list[list[int]]:
    """A grid as SGLang or Hugging Face hold it (tensor, array, list; [3] or [n, 3]) as a list of (t, h, w)."""
    rows: list[list[int]] = torch.as_tensor(value).reshape(-1, 3).tolist()
    return rows


def _numbers(value: Any) -> list[float] | None:
    return None if value is None else [float(x) for x in torch.as_tensor(value).reshape(-1).tolist()]


CACHE = "_mm_sglang_layout"  # attribute of a request's mm_inputs: the layout goes when the request goes


def layout_from_sglang(mm_inputs: Any, length: int, merge: int, device: torch.device | str = "cpu") -> TokenLayout:
    """Layout of positions [0, length) of one request; its coordinates are computed once, for the first chunk.

    Args:
        mm_inputs: SGLang's `MultimodalInputs` (schedule_batch.py) or None for a text request. Item offsets are
            absolute in the whole prompt with inclusive ends, the same in every chunk and on a radix hit.
        length: positions known so far: prefix + chunk.
        merge: the vision tower's spatial_merge_size.
        device: where the coordinates are kept.

    Raises:
        ValueError: an item without a grid (precomputed embeddings), of another modality, or whose offsets and grid
            disagree.
    """
    if mm_inputs is None:
        return TokenLayout(items=(), length=length, device=device)
    items = _items(mm_inputs.mm_items, merge)
    whole: TokenLayout | None = getattr(mm_inputs, CACHE, None)
    if whole is None or whole.items != items:  # a session's later turn may have brought more images
        whole = TokenLayout(items=items, length=items[-1].spans[-1][1] if items else 0, device=device)
        setattr(mm_inputs, CACHE, whole)
    return whole.until(length)


def assumed_video(shape: AssumedVideo, length: int, device: torch.device | str) -> TokenLayout:
    """A prompt of `length` tokens as videos of this shape with text between, from its start; for benchmarks."""
    return _assumed(shape, 1 << max(16, (length - 1).bit_length()), str(device)).until(length)


@lru_cache(maxsize=4)
def _assumed(shape: AssumedVideo, length: int, device: str) -> TokenLayout:
    size = shape.frames * shape.rows * shape.cols
    spans = [(start, start + size) for start in range(0, length, size + shape.text)]
    grids = [(shape.frames, shape.rows, shape.cols)] * len(spans)
    items = tuple(consume_grids(VIDEO, grids, spans, 1))
    return TokenLayout(items=items, length=length, device=device)


def _items(entries: Sequence[Any], merge: int) -> tuple[VisionItem, ...]:
    items: list[VisionItem] = []
    for entry in entries:
        name = entry.modality.name.lower()
        if name not in ("image", "video"):
            raise ValueError(f"modality {name!r} has no token layout rule: needs image or video")
        data = entry.model_specific_data
        grid = data.get(f"{name}_grid_thw")
        if grid is None or not entry.offsets:
            raise ValueError(f"{name} item without {name}_grid_thw and offsets: its token layout is unknown")
        spans = [(int(start), int(end) + 1) for start, end in entry.offsets]
        seconds = _numbers(data.get("second_per_grid_ts")) if name == "video" else None
        grids = _rows(grid)
        if seconds is not None and len(seconds) != len(grids):
            seconds = None  # SGLang copies the whole request's list into some items; then it says nothing of this one
        items += consume_grids(VIDEO if name == "video" else IMAGE, grids, spans, merge, seconds)
    return tuple(sorted(items, key=lambda item: item.spans[0][0]))


def _runs(ids: torch.Tensor, token: int) -> list[tuple[int, int]]:
    """Half-open ranges in which `ids` ([N]) equals `token`."""
    edge = torch.diff(
        (ids == token).int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32)
    )
    return list(zip(torch.where(edge == 1)[0].tolist(), torch.where(edge == -1)[0].tolist(), strict=True))


def layout_from_processor(
    output: Mapping[str, Any], *, image_token_id: int, video_token_id: int, merge: int, row: int = 0
) -> TokenLayout:
    """Layout of one prompt from a Hugging Face processor's output (`input_ids`, `*_grid_thw`).

    Args:
        output: BatchFeature with input_ids [batch, N] or [N]; image_grid_thw / video_grid_thw [n, 3] of this prompt.
        image_token_id, video_token_id: the model config's ids.
        merge: the vision tower's spatial_merge_size.
        row: which prompt of the batch; the grids must be that prompt's own.

    Raises:
        ValueError: the ids hold more or fewer vision tokens than the grids need.
    """
    ids = torch.as_tensor(output["input_ids"])
    ids = ids if ids.ndim == 1 else ids[row]
    items: list[VisionItem] = []
    for modality, name, token in ((IMAGE, "image", image_token_id), (VIDEO, "video", video_token_id)):
        grid = output.get(f"{name}_grid_thw")
        seconds = _numbers(output.get("second_per_grid_ts")) if modality == VIDEO else None
        items += consume_grids(modality, [] if grid is None else _rows(grid), _runs(ids, token), merge, seconds)
    items.sort(key=lambda item: item.spans[0][0])
    return TokenLayout(items=tuple(items), length=len(ids))
