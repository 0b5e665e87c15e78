"""What each recipe must attend, written independently of kernels/: plain Python and numpy, token by token.

Returns bool masks [Nq, Nk]. Nothing here imports the product except the sizes it promises.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

TILE, BUCKET = 128, 64
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
CLASSES = ("text", "vision")


@dataclass
class Prompt:
    """One chunk: q [Nq, H, D], k [Nk, Hkv, D]; (item or -1, frame, row, column) of each position; items' grids."""

    q: Floats
    k: Floats
    scale: float
    what: list[tuple[int, int, int, int]]
    grids: list[tuple[int, int, int]]  # frames, rows, columns of each item

    @property
    def keys(self) -> int:
        return len(self.k)

    @property
    def prefix(self) -> int:
        return len(self.k) - len(self.q)

    def of(self, name: str | None, first: int = 0) -> list[int]:
        """Positions of a class from `first` on."""
        return [n for n in range(first, self.keys) if name is None or (self.what[n][0] < 0) == (name == "text")]

    def weights(self, head: int, rows: list[int], keys: list[int]) -> Floats:
        """Causal softmax [rows, keys] of one query head over those keys; a row that sees none is zero."""
        share = self.q.shape[1] // self.k.shape[1]
        logits = self.q[[r - self.prefix for r in rows], head] @ self.k[keys, head // share].T * self.scale
        seen = np.array(keys)[None] <= np.array(rows)[:, None]
        logits = np.where(seen, logits, -np.inf)
        top = np.maximum(logits.max(1, keepdims=True, initial=-np.inf), -1e300)
        weights = np.exp(logits - top)
        return weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)  # type: ignore[no-any-return]


@dataclass
class Kept:
    """What a recipe keeps: None where it does not choose columns or buckets at all."""

    everything: bool = False
    sink: int = 0
    columns: set[int] | None = None
    buckets: set[int] | None = None
    rows: set[int] = field(default_factory=set)
    blocks: dict[str, Any] | None = None


def best(score: Floats, keep: int, coverage: float | None, forced: set[int], graded: bool = True) -> set[int]:
    """At most `keep` entries, forced ones first, then the greatest, until they hold `coverage` of all; none without.

    `graded`: masses that share the top bits of their fp32 form are equal, and of equal ones the first come first.
    """
    grade = score.astype(np.float32).view(np.int32) >> 18 if graded else score
    order = sorted(range(len(score)), key=lambda n: (n not in forced, -grade[n]))
    taken: set[int] = set()
    last = -1  # grade of the last one taken: of equal ones all are, within `keep`
    for n in order[: max(keep, len(forced))]:
        held = sum(float(score[m]) for m in taken)
        enough = coverage is not None and held >= coverage * float(score.sum()) and grade[n] != last
        if n not in forced and (grade[n] <= 0 or enough):
            break
        taken.add(n)
        last = -1 if n in forced else grade[n]
    return taken


def lines(recipe: dict[str, Any], prompt: Prompt, mass: dict[int, float]) -> set[int]:
    """Keys on the best lines: of the stride whose lines hold most attention beyond their share of the keys."""
    strides = {"frame": [("frame", 1)], "row": [("row", 1)]}
    strides["auto"] = [("frame", 1), ("frame", 2), ("row", 1), ("row", 2)]
    total, vision, best_score, best_keys = sum(mass.values()), len(prompt.of("vision")), -np.inf, set[int]()
    for unit, multiple in strides[recipe.get("stride", "frame")]:
        keys: set[int] = set()
        held, kept = 0.0, 0
        for item, (frames, rows, cols) in enumerate(prompt.grids):
            base = cols if unit == "row" else rows * cols
            size = base * multiple
            wanted = min(max(1, round(recipe.get("lines", 4) * base / (rows * cols))), size)
            by_line: dict[int, list[int]] = {}
            for n, (own, t, y, x) in enumerate(prompt.what):
                if own == item:
                    line = x + y % multiple * cols if unit == "row" else x + y * cols + t % multiple * rows * cols
                    by_line.setdefault(line, []).append(n)
            score = {line: sum(mass.get(n, 0.0) for n in members) for line, members in by_line.items()}
            for line in sorted(score, key=lambda entry: (-score[entry], entry))[:wanted]:
                keys |= set(by_line[line])
                held += score[line]
            kept += wanted * -(-frames * rows * cols // size)
        merit = held / max(total, 1e-30) - min(1.0, kept / max(1, vision))
        if merit > best_score + 1e-9:
            best_score, best_keys = merit, keys
    return best_keys


def kept(
    recipe: dict[str, Any], prompt: Prompt, friends: list[int], head: int, queries: str | None, keys: str | None
) -> Kept:
    """One recipe for the queries and keys of a class; `friends` share its KV head and recipe, and so its columns."""
    near = set(range(-(-recipe.get("local", 1) // BUCKET)))
    kind = recipe["pattern"]
    if kind == "dense":
        return Kept(everything=True)
    if kind == "block_topk":
        return Kept(blocks=recipe)
    if kind == "a_shape":
        return Kept(sink=recipe.get("sink", 128), buckets=near)
    own = prompt.of(queries, prompt.prefix)
    everything = list(range(prompt.keys))
    if kind in ("vertical_slash", "column_blocks"):
        rows = own[-recipe.get("last_q", 64) :]
        column = sum((prompt.weights(f, rows, everything).mean(0) for f in friends), np.zeros(prompt.keys))
        allowed = prompt.of(keys)
        column = column[allowed] / len(friends)
        sink = {i for i, n in enumerate(allowed) if n < recipe.get("sink", 30)}
        coverage = recipe.get("coverage")
        columns = {allowed[i] for i in best(column, recipe.get("columns", 1000), coverage, sink)}
        if kind == "column_blocks":
            budgets = {"sink": 0, "blocks": recipe["blocks"], "local": recipe["local"]}
            return Kept(columns=columns, blocks=budgets | {"score": "clusters"})
        bucket = np.zeros(-(-prompt.keys // BUCKET))
        for row, weight in zip(rows, prompt.weights(head, rows, everything), strict=True):
            for n in range(row + 1):
                bucket[(row - n) // BUCKET] += weight[n]
        near = {b for b in near if b < len(bucket)}
        return Kept(
            columns=columns,
            buckets=best(bucket / bucket.max(), -(-recipe.get("slashes", 4096) // BUCKET), coverage, near),
        )
    assert kind == "grid"
    text, chosen = set(prompt.of("text")), set[int]()
    grid_columns: set[int] | None = None
    grid_rows: set[int] = set()
    vision = prompt.of("vision")
    if vision and keys != "text":
        frame = max(rows * cols for _, rows, cols in prompt.grids)
        rows = own[-min(max(recipe.get("last_q", 64), frame), 1024) :]
        mass = sum((prompt.weights(f, rows, vision).sum(0) for f in friends), np.zeros(len(vision)))
        chosen = lines(recipe, prompt, dict(zip(vision, mass.tolist(), strict=True)))
        if recipe.get("vertical", True):
            grid_columns = chosen
        if recipe.get("horizontal", True):
            grid_rows = chosen
    if recipe.get("text", True) and text:
        if keys != "vision":
            grid_columns = (grid_columns or set()) | text
        if keys is None and queries != "vision":
            grid_rows = grid_rows | text
    return Kept(sink=recipe.get("sink", 128), columns=grid_columns, buckets=near, rows=grid_rows & set(own))


def tiled(prompt: Prompt, head: int, parts: list[tuple[str | None, Kept]], q_order: list[int]) -> dict[int, Bools]:
    """Row by row what a group attends: its kept keys rounded outward to tiles of its key order."""
    segments: list[list[int]] = []
    if len(parts) == 1 and parts[0][0] is None and parts[0][1].columns is None:
        kept = parts[0][1]
        sink = 0 if kept.everything else min(-(-kept.sink // TILE) * TILE, prompt.keys)
        segments = [list(range(sink)), list(range(sink, prompt.keys))]
    else:
        columns: set[int] = set()
        for name, kept in parts:
            members = set(prompt.of(name))
            columns |= members if kept.everything else {n for n in members if n < kept.sink}
            columns |= members & (kept.columns or set())
        segments = [sorted(columns)] + [[n for n in prompt.of(name) if n not in columns] for name, _ in parts]
    out = {i: np.zeros(prompt.keys, dtype=bool) for i in q_order}
    for a in range(0, len(q_order), TILE):
        q_tile = q_order[a : a + TILE]
        low, high = min(q_tile), max(q_tile)
        for s, slots in enumerate(segments):
            part = parts[s - 1][1] if s else Kept(everything=True)
            tiles = [slots[b : b + TILE] for b in range(0, len(slots), TILE)]
            wanted = set(range(len(tiles)))
            if part.blocks is not None:
                wanted = top_blocks(prompt, head, part.blocks, q_tile, tiles)
            for number, tile_keys in enumerate(tiles):
                if part.buckets is not None and not any(
                    low - BUCKET * b - BUCKET + 1 <= j <= high - BUCKET * b for b in part.buckets for j in tile_keys
                ):
                    continue
                if part.everything and s and len(segments) > 2:  # its keys stand among the columns
                    continue
                if number in wanted:
                    for i in q_tile:
                        out[i][[j for j in tile_keys if j <= i]] = True
    return out


def runs(x: Any, rows: list[int], parts: int) -> Any:
    """[parts, D]: means of the tile's runs of neighbouring rows; of one that has none, the mean of all."""
    size = TILE // parts
    return np.stack([x[rows[n : n + size] or rows].mean(0) for n in range(0, TILE, size)])


def clusters(x: Any, rows: list[int]) -> list[tuple[int, Any]]:
    """(number, mean) of up to four groups: rows nearest to the mean, and to each row furthest from all before it."""
    centres = [x[rows].mean(0)]
    for _ in range(3):
        apart = [min(float(((x[row] - c) ** 2).sum()) for c in centres) for row in rows]
        centres.append(x[rows[int(np.argmax(apart))]])
    nearest = [int(np.argmin([float(((x[row] - c) ** 2).sum()) for c in centres])) for row in rows]
    groups = [[row for row, own in zip(rows, nearest, strict=True) if own == n] for n in range(4)]
    return [(len(group), x[group].mean(0)) for group in groups if group]


def top_blocks(
    prompt: Prompt, head: int, recipe: dict[str, Any], q_tile: list[int], tiles: list[list[int]]
) -> set[int]:
    """Key tiles of best pooled, clusters' or antidiagonal score for one query tile."""
    share = prompt.q.shape[1] // prompt.k.shape[1]
    reached = [n for n, tile in enumerate(tiles) if tile[0] <= max(q_tile)]
    if not reached:
        return set()
    x, y = prompt.q[:, head], prompt.k[:, head // share]
    q_rows = [i - prompt.prefix for i in q_tile]
    score = []  # by tile, and by part of the queries
    for n in reached:
        number: Any = 1
        if recipe.get("score") == "clusters":
            number, mean_k = zip(*clusters(y, tiles[n]), strict=True)
            logits = runs(x, q_rows, 4) @ np.stack(mean_k).T * prompt.scale
        elif recipe.get("score") == "antidiagonal":
            queries, backwards = runs(x, q_rows, TILE), runs(y, tiles[n], TILE)[::-1]
            logits = queries.reshape(8, -1) @ backwards.reshape(8, -1).T * prompt.scale / 16
        else:
            logits = runs(x, q_rows, 1) @ runs(y, tiles[n], 1).T * prompt.scale
        top = logits.max(1)
        score.append(np.log((np.array(number) * np.exp(logits - top[:, None])).sum(1)) + top)
    weight = np.exp(np.array(score) - np.max(score, 0))
    weight = (weight / weight.sum(0)).mean(1)
    local = -(-recipe.get("local", 256) // TILE)
    forced = set(range(min(-(-recipe.get("sink", 128) // TILE), len(reached))))
    forced |= set(range(max(0, len(reached) - local), len(reached)))
    kept = best(weight, recipe.get("blocks", 64), recipe.get("coverage"), forced, graded=False)
    least = recipe.get("least", 0.0) / recipe.get("blocks", 64)
    return {n for n in kept if n in forced or weight[n] >= least}


def attended_by_head(recipes: list[dict[str, Any]], prompt: Prompt) -> list[Bools]:
    """The mask of every query head; heads share an estimate if they share a KV head and a recipe."""
    share = prompt.q.shape[1] // prompt.k.shape[1]
    out = []
    for head, recipe in enumerate(recipes):
        friends = [h for h in range(len(recipes)) if h // share == head // share and recipes[h] == recipe]
        out.append(_attended(recipe, prompt, friends, head))
    return out


def _attended(recipe: dict[str, Any], prompt: Prompt, friends: list[int], head: int) -> Bools:
    boundary = recipe.get("boundary", "none")
    plain = {key: value for key, value in recipe.items() if key != "boundary"}
    mask: dict[int, Bools] = {}
    classes: list[str | None] = [None]
    if boundary in ("q", "2d"):
        classes = [c for c in CLASSES if prompt.of(c, prompt.prefix)]
        classes.sort(key=lambda c: -len(prompt.of(c, prompt.prefix)))
    for turn, name in enumerate(classes):
        key_classes = [c for c in CLASSES if prompt.of(c)] if boundary in ("k", "2d") else [None]
        parts = []
        for key in key_classes:
            part = f"{name}->{key}" if boundary == "2d" else (name if boundary == "q" else key)
            own = recipe["parts"][part] if "parts" in recipe else plain
            parts.append((key, kept(own, prompt, friends, head, name, key)))
        # the commoner class runs in place, over all rows; the other's rows come after and replace theirs
        q_order = prompt.of(name if turn else None, prompt.prefix)
        mask |= tiled(prompt, head, parts, q_order)
        for i in set().union(*(part.rows for _, part in parts)):
            mask[i] = np.arange(prompt.keys) <= i
    return np.stack([mask[i] for i in range(prompt.prefix, prompt.keys)])
