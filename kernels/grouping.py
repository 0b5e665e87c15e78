"""From a recipe's selections to head groups: query classes, key orders, segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from mm_sglang.kernels import classes
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.ops import Ops
from mm_sglang.kernels.patterns.base import HeadPattern, Selection, View
from mm_sglang.kernels.patterns.dense import Dense, TextTail
from mm_sglang.kernels.plan import BUCKET, PAD, TILE, Bands, HeadGroup, Segment, device_ints
from mm_sglang.kernels.share import Team


def groups_of(
    q: torch.Tensor,
    k: torch.Tensor,
    slots: torch.Tensor | None,
    layout: TokenLayout,
    patterns: Sequence[HeadPattern],
    pattern: HeadPattern,
    scale: float,
    ops: Ops,
    team: Team | None,
) -> Iterator[HeadGroup]:
    """Groups of the heads whose recipe is `pattern`, in the order in which an engine must run them."""
    heads, kv_head = _heads([own == pattern for own in patterns], len(patterns) // k.shape[1])
    view = View(ops=ops, q=q, k=k, slots=slots, scale=scale, layout=layout, heads=heads, kv_head=kv_head, team=team)
    # The commoner class runs in place, over all rows; the other's rows are gathered and overwrite theirs.
    present = pattern.query_classes
    if None not in present:
        present = classes.commonest_first(layout, view.prefix)
    for turn, query_class in enumerate(present):
        own = replace(view, query_class=query_class, masses={})
        if turn:
            assert query_class is not None
            order = classes.order(layout, query_class, view.prefix, view.keys)
            own = replace(own, q_order=order.expand(len(kv_head), -1).contiguous())
        parts = [
            (key_class, recipe.select(replace(own, key_class=key_class)))
            for key_class, recipe in pattern.parts(query_class)
            if key_class is None or classes.count(layout, key_class, 0, view.keys)
        ]
        yield _group(own, pattern, parts)
        for _, chosen in parts:
            if chosen.rows is not None:
                rows = chosen.rows
                if query_class is not None:
                    rows = rows & classes.mask(layout, query_class)[view.prefix :]
                yield _whole_rows(own, pattern, rows, chosen.rows_most)


def text_tail(
    q: torch.Tensor, k: torch.Tensor, slots: torch.Tensor | None, layout: TokenLayout, patterns: Sequence[HeadPattern],
    most: int, scale: float, ops: Ops,
) -> HeadGroup | None:  # fmt: skip
    """The chunk's last text queries, `most` at most, with every key, for all heads that are not dense anyway."""
    sparse = [not isinstance(own, Dense) for own in patterns]
    number = classes.tail(layout, len(q), most)
    if not number or not any(sparse):
        return None
    heads, kv_head = _heads(sparse, len(patterns) // k.shape[1])
    at = torch.arange(-(-number // TILE) * TILE, dtype=torch.int32, device=q.device)
    order = torch.where(at < number, at + (layout.length - number), PAD).int()
    view = View(
        ops=ops, q=q, k=k, slots=slots, scale=scale, layout=layout, heads=heads, kv_head=kv_head,
        q_order=order.expand(len(kv_head), -1).contiguous(),
    )  # fmt: skip
    return _natural(view, TextTail(), Selection(everything=True))


def _heads(chosen: Sequence[bool], ratio: int) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """HeadGroup.heads and .kv_head of the heads that are chosen."""
    rows: dict[int, list[int]] = {}
    for head, own in enumerate(chosen):
        if own:
            rows.setdefault(head // ratio, []).append(head)
    g = max(len(row) for row in rows.values())
    return tuple(tuple(row + [-1] * (g - len(row))) for row in rows.values()), tuple(rows)


def _group(view: View, pattern: HeadPattern, parts: list[tuple[str | None, Selection]]) -> HeadGroup:
    """One group for one share of the queries; see HeadGroup for what the orders and segments mean."""
    keys, count = view.keys, len(view.kv_head)
    if [key_class for key_class, _ in parts] == [None] and parts[0][1].columns is None:
        return _natural(view, pattern, parts[0][1])
    device = view.q.device
    kept: torch.Tensor | None = None
    most = 0
    for key_class, chosen in parts:
        allowed = None if key_class is None else classes.mask(view.layout, key_class)
        number = _keys(view, key_class)
        own = allowed if chosen.everything else chosen.columns
        if own is not None and allowed is not None and own is not allowed:
            own = own & allowed
        kept = own if kept is None else kept if own is None else kept | own
        most += number if chosen.everything else min(chosen.columns_most, number)
        if chosen.sink:
            first = classes.first(view.layout, key_class, chosen.sink)
            kept = first if kept is None else kept | first
            most += min(chosen.sink, number)
    by_class = None if parts[0][0] is None else _segments_of(view.layout, parts)
    tiles = -(-keys // TILE) + len(parts)
    if kept is None:
        kept = torch.zeros(keys, dtype=torch.bool, device=device)
    order, start, rank = view.ops.key_order(kept.expand(count, -1), by_class, len(parts) + 1, tiles)
    clusters = None
    if any(chosen.rest for _, chosen in parts):
        clusters = view.ops.clusters(view.k, order, view.slots, view.kv_head, keys)
    segments, width = [Segment()], 0
    for s, (key_class, chosen) in enumerate(parts, 1):
        number = -(-_keys(view, key_class) // TILE)
        bands, blocks = chosen.bands, chosen.blocks
        if chosen.rest is not None and clusters is not None:
            blocks = chosen.rest(*(_tiles_from(x, start[:, s], number) for x in clusters))
        if bands is None and blocks is None:
            heads = count * len(view.heads[0])
            empty = torch.zeros(heads, 1, dtype=torch.int32, device=device)
            bands = Bands(index=empty, count=empty[:, 0])
        segments.append(Segment(bands=bands, blocks=blocks))
        width += _width(segments[-1], number, view.q_order is not None)
    return HeadGroup(
        pattern=pattern, prefix=view.prefix, queries=view.queries, heads=view.heads, kv_head=view.kv_head,
        q_order=view.q_order, k_order=order, start=start, rank=rank,
        limits=view.ops.limits(start, rank, view.q_order, view.prefix, view.queries),
        segments=tuple(segments), width=min(width + -(-min(most, keys) // TILE), tiles),
        tile_lists=view.ops.tile_lists,
    )  # fmt: skip


def _keys(view: View, key_class: str | None) -> int:
    return view.keys if key_class is None else classes.count(view.layout, key_class, 0, view.keys)


def _tiles_from(x: torch.Tensor, start: torch.Tensor, tiles: int) -> torch.Tensor:
    """[R, tiles, E] of x [R, Mk, E], those of the segment that begins at slot `start` (int32 [R]).

    A segment may be shorter than `tiles`; what follows it then is nobody's to see.
    """
    at = start.long()[:, None] // TILE + torch.arange(tiles, device=start.device)
    return x.gather(1, at.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2]))


def _segments_of(layout: TokenLayout, parts: list[tuple[str | None, Selection]]) -> torch.Tensor:
    """Segment number of each key; keys of a class without a part don't exist, so two classes are both there."""
    return classes.segment_of(layout) if len(parts) == 2 else torch.ones_like(classes.segment_of(layout))


def _natural(view: View, pattern: HeadPattern, chosen: Selection) -> HeadGroup:
    """Keys stay in prompt order: nothing but a sink stands apart, and that already comes first."""
    keys, tiles = view.keys, -(-view.keys // TILE)
    last = Segment(bands=chosen.bands, blocks=chosen.blocks)
    sink = 0 if chosen.everything else min(-(-chosen.sink // TILE) * TILE, keys)
    bounds = (0, sink, keys) if sink and sink < keys else (0, keys)
    segments = (Segment(), last) if len(bounds) == 3 else (Segment() if sink else last,)
    start = device_ints(bounds * len(view.kv_head), view.q.device).view(len(view.kv_head), -1)
    return HeadGroup(
        pattern=pattern, prefix=view.prefix, queries=view.queries, heads=view.heads, kv_head=view.kv_head,
        q_order=view.q_order, k_order=None, start=start, rank=None,
        limits=view.ops.limits(start, None, view.q_order, view.prefix, view.queries), segments=segments,
        width=min(_width(last, tiles, view.q_order is not None) + sink // TILE, tiles),
        tile_lists=view.ops.tile_lists, everything=chosen.everything,
    )  # fmt: skip


def _width(segment: Segment, tiles: int, gathered: bool) -> int:
    """A bound on the tiles a query tile lists of a segment, from sizes the host knows."""
    if segment.blocks is not None:
        return min(max(segment.blocks.keep, segment.blocks.sink + segment.blocks.local), tiles)
    if segment.bands is not None and not gathered:
        return min(segment.bands.index.shape[1] * (2 + -(-BUCKET // TILE)), tiles)
    return tiles  # gathered queries may lie anywhere, so a band may cross any tile


def _whole_rows(view: View, pattern: HeadPattern, rows: torch.Tensor, most: int) -> HeadGroup:
    """The queries `rows` (bool [R, Nq], `most` at most) with every key: horizontal lines."""
    tiles = -(-most // TILE)
    order, start, _ = view.ops.key_order(rows, None, 2, tiles)
    inside = torch.arange(tiles * TILE, device=order.device) < start[:, 1:2]
    order = torch.where(inside & (order != PAD), order + view.prefix, PAD)
    own = replace(view, q_order=order)
    return _natural(own, pattern, Selection(everything=True))
