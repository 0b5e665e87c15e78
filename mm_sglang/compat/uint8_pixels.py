"""Pixels stay whole numbers from the processor to the vision tower: a quarter of the bytes on their way.

Why: Qwen-VL's processors hand out patches as normalised fp32, 18.8 GB for a video of a million tokens, and SGLang
    pickles them from its tokenizer process to the ranks. Decoded and resized frames are uint8 before that.
How: AROUND `QwenVLImageProcessor.__init__` (mm_sparse, the models below, features sent over the CPU): the image and
    the video processor neither rescale nor normalise, so that their patches stay uint8; AROUND
    `.process_mm_data_async`: items with uint8 patches say by what to normalise them. AROUND `get_image_feature` and
    `get_video_feature` of Qwen2.5-VL and Qwen3-VL: the tower gets them as they are and a slice's frames are normalised
    when it takes them (vision_slices.py), on its device, by the same fp32 operations in the same order, so the bits are
    the processor's. AROUND `_move_items_to_device`: until then they stay in the host's memory, of which SGLang would
    copy a million tokens' 4.9 GB to every rank's GPU and back.
Upstream: sglang/srt/multimodal/processors/qwen_vl.py, sglang/srt/models/qwen2_5_vl.py, qwen3_vl.py,
    sglang/srt/managers/mm_schedule.py; transformers/image_processing_backends.py rescale_and_normalize.
Versions: 0.5.23. Remove when SGLang sends pixels as uint8.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

log = logging.getLogger(__name__)
NORM = "mm_sglang_norm"  # in an item's model_specific_data: (mean, std) of each colour, for pixels of 0 to 255
ROWS = 1 << 16  # patches normalised at once: 308 MB of fp32
MODELS = ("qwen2_5_vl.Qwen2_5_VLForConditionalGeneration", "qwen3_vl.Qwen3VLForConditionalGeneration")


def normalised(patches: torch.Tensor, norm: tuple[Sequence[float], Sequence[float]], tower: Any) -> torch.Tensor:
    """uint8 [n, colours * patch] as the processor would have made them, in the tower's dtype on its device."""
    mean, std = (torch.tensor(values, device=tower.device)[:, None] for values in norm)
    out = torch.empty(patches.shape, dtype=tower.dtype, device=tower.device)
    for first in range(0, len(patches), ROWS):
        part = patches[first : first + ROWS].to(tower.device).float().view(-1, len(mean), patches.shape[1] // len(mean))
        out[first : first + ROWS] = part.sub_(mean).div_(std).flatten(1)
    return out


def norm_of(processor: Any) -> tuple[list[float], list[float]]:
    """Mean and std by colour for pixels of 0 to 255, rounded as transformers' fused rescaling rounds them."""
    mean, std = (
        torch.tensor(values) * (1.0 / processor.rescale_factor)
        for values in (processor.image_mean, processor.image_std)
    )
    return mean.tolist(), std.tolist()


def _init(
    original: Callable[..., Any], self: Any, hf_config: Any, server_args: Any, _processor: Any, *args: Any,
    **kwargs: Any,
) -> None:  # fmt: skip
    from transformers.image_processing_backends import TorchvisionBackend

    original(self, hf_config, server_args, _processor, *args, **kwargs)
    if not {model.rpartition(".")[2] for model in MODELS} & set(hf_config.architectures or ()):
        return  # SGLang's processor serves other models too, which nothing here would normalise for
    if server_args.attention_backend != "mm_sparse" or self.mm_feature_transport != "cpu":
        return
    parts = {"image": _processor.image_processor, "video": _processor.video_processor}
    if not all(isinstance(p, TorchvisionBackend) and p.do_rescale and p.do_normalize for p in parts.values()):
        log.info("mm_sglang: pixels travel as the processor makes them: it is none of those known to keep uint8")
        return
    self._mm_sglang_norms = {name: norm_of(part) for name, part in parts.items()}
    for part in parts.values():
        part.do_rescale = part.do_normalize = False
    log.info("mm_sglang: pixels travel as uint8 (compat/uint8_pixels.py)")


async def _process(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.managers.schedule_batch import MultimodalInputFormat

    made = await original(self, *args, **kwargs)
    norms = getattr(self, "_mm_sglang_norms", None)
    if norms is None or made is None:
        return made
    for item in made.mm_items:
        if item.format != MultimodalInputFormat.NORMAL:  # ready-made by the caller
            continue
        if item.feature.dtype != torch.uint8:
            raise ValueError(f"pixels of {item.feature.dtype}: needs images and videos of uint8")
        item.model_specific_data[NORM] = norms["video" if item.is_video() else "image"]
    return made


class Pixels:
    """uint8 patches of items, one after another. Rows that are sliced out come normalised, on the tower's device."""

    def __init__(self, items: Sequence[Any], tower: Any) -> None:
        self.items, self.tower = items, tower

    def __len__(self) -> int:
        return sum(len(item.feature) for item in self.items)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        first, last, _ = rows.indices(len(self))
        parts, start = [], 0
        for item in self.items:
            part = item.feature[max(first - start, 0) : max(last - start, 0)]
            if len(part):
                parts.append(normalised(part, item.model_specific_data[NORM], self.tower))
            start += len(item.feature)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What a tower that is not run in slices begins with."""
        return self[:]


def _is_packed(item: Any) -> bool:
    return isinstance(item.feature, torch.Tensor) and item.feature.dtype == torch.uint8


def _move(original: Callable[..., Any], items: list[Any], device: Any, data_embedding_func: Any) -> None:
    original([item for item in items if not _is_packed(item)], device, data_embedding_func)


def _feature(original: Callable[..., Any], self: Any, items: list[Any]) -> Any:
    from sglang.srt.runtime_context import get_parallel

    by_items = self.use_data_parallel and get_parallel().attn_tp_size > 1  # SGLang's own sharing takes them apart
    if by_items or not all(map(_is_packed, items)):
        return original(self, [_unpacked(item, self.visual) for item in items])
    kind = "video_grid_thw" if items[0].is_video() else "image_grid_thw"
    grid = torch.cat([getattr(item, kind) for item in items])
    return self.visual(Pixels(items, self.visual), grid_thw=grid)


def _unpacked(item: Any, tower: Any) -> Any:
    if not _is_packed(item):
        return item
    own = copy.copy(item)
    own.feature = normalised(item.feature, item.model_specific_data[NORM], tower)
    return own


def install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    processor = "sglang.srt.multimodal.processors.qwen_vl.QwenVLImageProcessor"
    HookRegistry.register(f"{processor}.__init__", _init, HookType.AROUND)
    HookRegistry.register(f"{processor}.process_mm_data_async", _process, HookType.AROUND)
    HookRegistry.register("sglang.srt.managers.mm_schedule._move_items_to_device", _move, HookType.AROUND)
    for model in MODELS:
        for kind in ("image", "video"):
            HookRegistry.register(f"sglang.srt.models.{model}.get_{kind}_feature", _feature, HookType.AROUND)
