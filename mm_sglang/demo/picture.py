"""The picture of what was skipped: heads' tiles over the token layout, in prompt order and as the engine ran them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mm_sglang.kernels.inspection import attended, tile_map
from mm_sglang.kernels.layout import IMAGE, TEXT, VIDEO, TokenLayout
from mm_sglang.kernels.plan import TILE, Plan

PIXELS = 640  # of a panel's side; more would not be visible on a page
COLOURS = {TEXT: "#d1495b", IMAGE: "#edae49", VIDEO: "#30638e"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One head: all chunks of one prompt, first to last."""

    title: str
    head: int
    plans: tuple[Plan, ...]


def attended_pixels(panel: Panel, tokens: int) -> torch.Tensor:
    """Share of each pixel's (query, key) pairs that was attended, [side, side], prompt order; -1 above the diagonal."""
    side = min(PIXELS, tokens)
    pixel = torch.arange(tokens) * side // tokens
    hits, pairs = torch.zeros(side, side), torch.zeros(side, side)
    for plan in panel.plans:
        rows = pixel[plan.prefix : plan.keys]
        columns = pixel[: plan.keys]
        causal = torch.ones(plan.queries, plan.keys).tril(plan.prefix)
        for total, mask in ((hits, attended(plan, panel.head).float()), (pairs, causal)):
            by_column = torch.zeros(plan.queries, side).index_add_(1, columns, mask)
            total.index_add_(0, rows, by_column)
    return torch.where(pairs > 0, hits / pairs.clamp(min=1), -1.0)


def tile_rows(panel: Panel) -> torch.Tensor:
    """The tile lists of all chunks under each other, [Mq, Mk]: 0 not computed, 1 partial, 2 full."""
    maps = []
    for plan in panel.plans:
        maps += [tile_map(group, panel.head) for group in plan.groups if panel.head in group.members]
    width = max(m.shape[1] for m in maps)
    return torch.cat([torch.nn.functional.pad(m, (0, width - m.shape[1])) for m in maps])


def draw(panels: Sequence[Panel], layout: TokenLayout, title: str, path: Path) -> None:
    """Write the PNG: above, what each head attends in prompt order; below, its tiles in the order they were run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(2, len(panels), figsize=(5.2 * len(panels), 10.6), squeeze=False, layout="constrained")
    shade = plt.get_cmap("Blues").with_extremes(under="#f4f1ec")
    for column, panel in enumerate(panels):
        axis = axes[0][column]
        pixels = attended_pixels(panel, layout.length)
        axis.imshow(
            pixels, cmap=shade, vmin=0, vmax=1, extent=(0, layout.length, layout.length, 0), interpolation="nearest"
        )
        _frames_and_boundaries(axis, layout)
        axis.set_title(panel.title)
        axis.set_xlabel("key position")
        if column == 0:
            axis.set_ylabel("query position\n(prompt order: share attended)")
        axis = axes[1][column]
        axis.imshow(
            tile_rows(panel),
            cmap=ListedColormap(["#f4f1ec", "#8fb8de", "#1d4e89"]),
            vmin=0,
            vmax=2,
            interpolation="nearest",
        )
        axis.set_xlabel(f"key tile ({TILE} keys) after reordering")
        if column == 0:
            axis.set_ylabel("query tile, chunk after chunk\n(as the engine ran them)")
    names = [
        Patch(color=COLOURS[m], label=n)
        for m, n in ((TEXT, "text"), (IMAGE, "image"), (VIDEO, "video"))
        if (layout.modality == m).any()
    ]
    tiles = [
        Patch(color=c, label=n)
        for c, n in (("#1d4e89", "full tile"), ("#8fb8de", "partial tile"), ("#f4f1ec", "not computed"))
    ]
    figure.legend(handles=[*names, *tiles], loc="outside lower center", ncols=len(names) + len(tiles))
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _frames_and_boundaries(axis, layout: TokenLayout) -> None:  # type: ignore[no-untyped-def]
    """Thin lines where frames begin, thick ones where the modality changes, a coloured strip along both edges."""
    from matplotlib.patches import Rectangle

    starts = layout.frame_starts()
    for position in starts[:: max(1, len(starts) // 32)]:
        axis.axvline(position, color="#30638e", linewidth=0.25, alpha=0.6)
        axis.axhline(position, color="#30638e", linewidth=0.25, alpha=0.6)
    modality = layout.modality
    edges = [0, *(torch.where(modality[1:] != modality[:-1])[0] + 1).tolist(), layout.length]
    thick = 0.012 * layout.length
    for start, end in zip(edges, edges[1:], strict=False):
        colour = COLOURS[int(modality[start])]
        axis.add_patch(Rectangle((start, -thick), end - start, thick, color=colour, clip_on=False))
        axis.add_patch(Rectangle((-thick, start), thick, end - start, color=colour, clip_on=False))
    if len(edges) <= 40:  # Qwen3-VL has a boundary every frame: the frame lines show those
        for position in edges[1:-1]:
            axis.axvline(position, color="#d1495b", linewidth=1.2)
            axis.axhline(position, color="#d1495b", linewidth=1.2)
