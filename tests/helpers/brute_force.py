"""What each pattern must attend, written independently of kernels/: plain Python and numpy, token by token.

Returns bool masks [Nq, Nk]. Nothing here imports the product except the tile size it promises.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

TILE = 128
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def attention(q: Floats, k: Floats, prefix: int, scale: float) -> Floats:
    """Causal softmax weights [Nq, Nk] of one head."""
    logits = (q @ k.T) * scale
    for i in range(len(q)):
        logits[i, prefix + i + 1 :] = -np.inf
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)  # type: ignore[no-any-return]


def best(score: Floats, budget: int, forced: set[int]) -> set[int]:
    """The `budget` entries of greatest score, forced ones first."""
    order = sorted(range(len(score)), key=lambda n: (n not in forced, -score[n]))
    return set(order[: max(budget, len(forced))])


def tiled(queries: int, prefix: int, rows: set[int], columns: set[int], diagonals: set[int]) -> Bools:
    """Kept rows, columns and diagonals (positions, distances) rounded outward to tiles of the kept-first order."""
    keys = prefix + queries
    q_order = [i for i in range(prefix, keys) if i in rows] + [i for i in range(prefix, keys) if i not in rows]
    k_order = [j for j in range(keys) if j in columns] + [j for j in range(keys) if j not in columns]
    mask = np.zeros((queries, keys), dtype=bool)
    for a in range(0, queries, TILE):
        q_tile = q_order[a : a + TILE]
        for b in range(0, keys, TILE):
            k_tile = k_order[b : b + TILE]
            wanted = any(i in rows for i in q_tile) or any(j in columns for j in k_tile)
            near, far = min(q_tile) - max(k_tile), max(q_tile) - min(k_tile)
            if wanted or any(near <= d <= far for d in diagonals):
                for i in q_tile:
                    for j in k_tile:
                        mask[i - prefix, j] = j <= i
    return mask


def token_set(queries: int, prefix: int, rows: set[int], columns: set[int], diagonals: set[int]) -> Bools:
    """The same kept set without rounding: what a pattern promises at the very least."""
    mask = np.zeros((queries, prefix + queries), dtype=bool)
    for i in range(prefix, prefix + queries):
        for j in range(i + 1):
            mask[i - prefix, j] = i in rows or j in columns or (i - j) in diagonals
    return mask


def kept(
    recipe: dict[str, Any], weights: list[Floats], own: int, prefix: int, what: list[tuple[int, int, int]]
) -> tuple[set[int], set[int], set[int]]:
    """(rows, columns, diagonals) of one head.

    Args:
        recipe: as in YAML.
        weights: attention of the probe queries [L, Nk], one array for each head that shares this head's KV head.
        own: this head's place in that list.
        what: (item or -1, index of the token in its frame, column x) of each position.
    """
    keys = len(what)
    everything = set(range(keys))
    near = set(range(min(recipe.get("local", 1), keys)))
    sink = set(range(min(recipe.get("sink", 0), keys)))
    if recipe["pattern"] == "dense":
        return everything, set(), set()
    if recipe["pattern"] == "a_shape":
        return set(), sink, near
    column = sum(w.mean(0) for w in weights) / len(weights)
    assert isinstance(column, np.ndarray)
    if recipe["pattern"] == "vertical_slash":
        diagonal = np.zeros(keys)
        for index, w in enumerate(weights[own]):
            position = keys - len(weights[own]) + index
            for j in range(position + 1):
                diagonal[position - j] += w[j]
        return set(), best(column, recipe["columns"], sink), best(diagonal, recipe["slashes"], near)
    assert recipe["pattern"] == "grid"
    lines: dict[tuple[int, int], float] = {}
    name = {}
    for j, (item, place, x) in enumerate(what):
        if item >= 0:
            name[j] = (item, place if recipe["stride"] == "frame" else x)
            lines[name[j]] = lines.get(name[j], 0.0) + float(column[j])
    chosen = set()
    for item in {i for i, _ in lines}:
        ranked = sorted((line for line in lines if line[0] == item), key=lambda line: -lines[line])
        chosen |= set(ranked[: recipe["lines"]])
    text = {j for j in range(keys) if what[j][0] < 0}
    on_line = {j for j in name if name[j] in chosen}
    columns = sink | text | (on_line if recipe["vertical"] else set())
    rows = {i for i in text | (on_line if recipe["horizontal"] else set()) if i >= prefix}
    return rows, columns, near


def kept_by_head(
    recipes: list[dict[str, Any]],
    q: Floats,
    k: Floats,
    prefix: int,
    scale: float,
    coordinates: list[list[int]],
    cols: list[int],
) -> list[tuple[set[int], set[int], set[int]]]:
    """`kept` of every query head; heads share an estimate if they share a KV head and a recipe.

    Args:
        recipes: one a query head.
        q: [Nq, H, D]; k: [Nk, Hkv, D].
        coordinates: (item or -1, row y, column x) of each position.
        cols: columns of each item's grid.
    """
    what = [(item, y * cols[item] + x if item >= 0 else -1, x) for item, y, x in coordinates]
    group = q.shape[1] // k.shape[1]
    weights = [attention(q[:, h], k[:, h // group], prefix, scale) for h in range(len(recipes))]
    out = []
    for head, recipe in enumerate(recipes):
        friends = [h for h in range(len(recipes)) if h // group == head // group and recipes[h] == recipe]
        probes = [weights[h][-recipe.get("last_q", 1) :] for h in friends]
        out.append(kept(recipe, probes, friends.index(head), prefix, what))
    return out
