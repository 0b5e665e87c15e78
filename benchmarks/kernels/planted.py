"""Inputs whose attention has a known structure: what each head looks at is planted, the rest is noise.

On random inputs any sparse pattern loses; on these, "recall" means something. A planted key and the queries that look
at it share a direction, long enough that the planted keys of a late query hold about SHARE of its attention mass
whatever the length. Kinds, each of which one recipe fits: "blocks", "columns", "slashes", "grid", "boundary"; "mix"
gives KV head j kind j % 5; "random" plants nothing.

Made head by head and CHUNK rows at a time, so that a million tokens need little more memory than the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from mm_sglang.kernels.layout import VIDEO, TokenLayout, consume_grids

KINDS = ("blocks", "columns", "slashes", "grid", "boundary")
FRAME_TOKENS = 196  # 14 x 14
SPAN_FRAMES, SPAN_TEXT = 16, 512  # of "boundary" and "mix": frames of video, then text, and again
BLOCK, COLUMNS, OFFSETS = 128, 64, (1, 16)  # tokens; keys; frames back
SHARE, NOISE = 0.98, 0.5
CHUNK = 1 << 17


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What was planted: the kind of each KV head and its data, by kind.

    blocks: target int64 [2, group, n]. columns: int64 [64]. slashes: the two distances. grid: bool [tokens].
    boundary: (text bool [tokens], anchors bool [tokens]). random: None.
    """

    tokens: int
    group: int
    kinds: tuple[str, ...]
    data: tuple[Any, ...]

    def keys(self, head: int, rows: torch.Tensor) -> torch.Tensor:
        """Bool [len(rows), tokens]: the planted keys that queries at `rows` (int64) look at, causal."""
        kind, data = self.kinds[head // self.group], self.data[head // self.group]
        at = torch.arange(self.tokens, device=rows.device)
        if kind == "blocks":
            target = data[:, head % self.group][:, rows // BLOCK]  # [2, rows]
            on = (at // BLOCK == target[..., None]).any(0)
        elif kind == "columns":
            on = torch.isin(at, data).expand(len(rows), -1)
        elif kind == "slashes":
            distance = rows[:, None] - at
            on = (distance == data[0]) | (distance == data[1])
        elif kind == "grid":
            on = data.expand(len(rows), -1)
        elif kind == "boundary":
            text, anchors = data
            on = anchors & (text[rows][:, None] == text)
        else:
            on = torch.zeros(len(rows), self.tokens, dtype=torch.bool, device=rows.device)
        planted: torch.Tensor = on & (at <= rows[:, None])
        return planted


def layout_of(kind: str, tokens: int, device: torch.device | str) -> TokenLayout:
    """The layout that goes with a kind: one video from position 0; for "boundary" and "mix" with text between."""
    frames = -(-tokens // FRAME_TOKENS)
    spans = [(0, frames * FRAME_TOKENS)]
    if kind in ("boundary", "mix"):
        video = SPAN_FRAMES * FRAME_TOKENS
        spans = [(start, start + video) for start in range(0, tokens, video + SPAN_TEXT)]
        frames = SPAN_FRAMES * len(spans)
    items = tuple(consume_grids(VIDEO, [(frames, 28, 28)], spans, 2))
    return TokenLayout(items=items, length=tokens, device=device)


def planted(
    kind: str,
    *,
    tokens: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int = 128,
    seed: int = 0,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Truth]:
    """q [tokens, q_heads, head_dim], k and v [tokens, kv_heads, head_dim], and what was planted in them.

    Logits are q . k / sqrt(head_dim), causal.

    Raises:
        ValueError: unknown kind, head counts that don't divide, no tokens.
    """
    if kind not in (*KINDS, "mix", "random"):
        raise ValueError(f"kind={kind!r}: needs one of {(*KINDS, 'mix', 'random')}")
    if kv_heads < 1 or q_heads % kv_heads or q_heads < 1:
        raise ValueError(f"q_heads={q_heads}, kv_heads={kv_heads}: needs a multiple")
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: needs 1 or more")
    kinds = tuple(KINDS[j % len(KINDS)] if kind == "mix" else kind for j in range(kv_heads))
    source = _Source(torch.Generator(device=device).manual_seed(seed), tokens, head_dim, torch.device(device))
    q = torch.empty(tokens, q_heads, head_dim, dtype=dtype, device=device)
    k, v = (torch.empty(tokens, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
    layout, group, data = layout_of(kind, tokens, device), q_heads // kv_heads, []
    for j, own in enumerate(kinds):
        heads = slice(j * group, (j + 1) * group)
        source.noise(v[:, j : j + 1], 1.0)
        level = 1.0 if own == "random" else NOISE
        source.noise(k[:, j : j + 1], level)
        source.noise(q[:, heads], level)
        data.append(None if own == "random" else PLANTERS[own](source, q[:, heads], k[:, j], layout))
    return q, k, v, Truth(tokens=tokens, group=group, kinds=kinds, data=tuple(data))


@dataclass(frozen=True)
class _Source:
    """Random numbers, and how long a planted direction must be."""

    generator: torch.Generator
    tokens: int
    head_dim: int
    device: torch.device

    def noise(self, out: torch.Tensor, level: float) -> None:
        for first in range(0, self.tokens, CHUNK):
            part = out[first : first + CHUNK]
            part.copy_(torch.randn(part.shape, generator=self.generator, device=self.device) * level)

    def gain(self, keys_per_query: float) -> float:
        """So long in q and in k that this many keys outweigh all tokens SHARE to 1 - SHARE, 2 to spare."""
        logit = math.log(SHARE / (1 - SHARE) * 2 * self.tokens / keys_per_query)
        return math.sqrt(max(logit, 0.0) * math.sqrt(self.head_dim))

    def directions(self, number: int) -> torch.Tensor:
        """Unit vectors, fp32 [number, head_dim]."""
        raw = torch.randn(number, self.head_dim, generator=self.generator, device=self.device)
        return torch.nn.functional.normalize(raw, dim=1)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator, device=self.device)


def _add(x: torch.Tensor, table: torch.Tensor, index: torch.Tensor, gain: float) -> None:
    """x[n] += gain * table[index[n]] in fp32; x [tokens, ..., head_dim], index int64 [tokens, ...], -1: nothing."""
    for first in range(0, len(x), CHUNK):
        at = index[first : first + CHUNK]
        rows = table[at.clamp(min=0)] * (at >= 0)[..., None] * gain
        x[first : first + CHUNK] = (x[first : first + CHUNK].float() + rows).to(x.dtype)


def _blocks(source: _Source, q: torch.Tensor, k: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Every block of queries looks at two blocks at or before it, its own two for each head."""
    group, number = q.shape[1], -(-len(q) // BLOCK)
    block = torch.arange(len(q), device=q.device) // BLOCK
    table, gain = source.directions(number), source.gain(BLOCK)
    _add(k, table, block, gain)
    share = torch.rand(2, group, number, generator=source.generator, device=q.device)
    target = (share * torch.arange(1, number + 1, device=q.device)).long()
    for one in target:
        _add(q, table, one.T[block], gain)
    return target


def _columns(source: _Source, q: torch.Tensor, k: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Every query looks at the same COLUMNS keys."""
    at = torch.randperm(len(q), generator=source.generator, device=q.device)[:COLUMNS].sort().values
    return _shared(source, q, k, torch.isin(torch.arange(len(q), device=q.device), at), len(at) / 2, at)


def _grid(source: _Source, q: torch.Tensor, k: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Every query looks at one place of every frame; text between frames doesn't shift it."""
    place = int(source.integers(FRAME_TOKENS, 1))
    on = (layout.item >= 0) & (layout.y * 14 + layout.x == place)
    return _shared(source, q, k, on, len(q) / FRAME_TOKENS / 2, on)


def _shared(
    source: _Source, q: torch.Tensor, k: torch.Tensor, on: torch.Tensor, keys: float, data: torch.Tensor
) -> torch.Tensor:
    """All queries and the keys `on` get one direction."""
    table, gain = source.directions(1), source.gain(keys)
    _add(k, table, on.long() - 1, gain)
    _add(q, table, torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device), gain)
    return data


def _slashes(source: _Source, q: torch.Tensor, k: torch.Tensor, layout: TokenLayout) -> tuple[int, ...]:
    """Every query looks at the keys one frame and sixteen frames back: each key has a direction of its own."""
    table, gain = source.directions(len(q)), source.gain(1)
    at = torch.arange(len(q), device=q.device)
    _add(k, table, at, gain)
    distances = tuple(n * FRAME_TOKENS for n in OFFSETS)
    for distance in distances:
        index = torch.where(at >= distance, at - distance, -1)
        _add(q, table, index[:, None].expand(-1, q.shape[1]), gain)
    return distances


def _boundary(
    source: _Source, q: torch.Tensor, k: torch.Tensor, layout: TokenLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text looks at text anchors, vision at vision anchors, one key in 256 of each."""
    text = layout.item < 0
    anchors = torch.zeros(len(q), dtype=torch.bool, device=q.device)
    for mask in (text, ~text):  # one in each run of 256 of its class, so that no late query is without
        own = mask.nonzero()[:, 0]
        start = torch.arange(0, len(own), 256, device=q.device)
        anchors[own[(start + source.integers(256, len(start))).clamp(max=len(own) - 1)]] = True
    table, gain = source.directions(2), source.gain(len(q) / 1024)
    _add(k, table, torch.where(anchors, text.long(), -1), gain)
    _add(q, table, text.long()[:, None].expand(-1, q.shape[1]), gain)
    return text, anchors


PLANTERS = {"blocks": _blocks, "columns": _columns, "slashes": _slashes, "grid": _grid, "boundary": _boundary}
