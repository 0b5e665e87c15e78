"""HeadPattern: a query head's recipe. `select` says what it keeps of one chunk, from a look at the prompt itself.

Legend: R KV heads of a group and g query heads of each (G = R * g), Nq queries, Nk keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from mm_sglang.kernels import classes
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.plan import Bands, Blocks

if TYPE_CHECKING:
    from mm_sglang.kernels.ops import Ops
    from mm_sglang.kernels.share import Team


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """What a recipe may look at: the chunk's tensors for its heads, and the share of queries and keys it is for.

    Args:
        q: [Nq, H, D] the chunk's queries; k: [P, Hkv, D]; slots: int32 [Nk] or None, as in the engines.
        heads, kv_head: as in HeadGroup.
        query_class, key_class: "text", "vision", or None for all.
        q_order: int32 [R, Mq * TILE] or None, as in HeadGroup.
        masses: estimates already made for these queries, by their arguments.
        team: ranks that make this same plan and share out its estimates; None: one alone.
    """

    ops: Ops
    q: torch.Tensor
    k: torch.Tensor
    slots: torch.Tensor | None
    scale: float
    layout: TokenLayout
    heads: tuple[tuple[int, ...], ...]
    kv_head: tuple[int, ...]
    query_class: str | None = None
    key_class: str | None = None
    q_order: torch.Tensor | None = None
    masses: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    team: Team | None = None

    @property
    def keys(self) -> int:
        return self.layout.length

    @property
    def queries(self) -> int:
        return len(self.q)

    @property
    def prefix(self) -> int:
        return self.keys - self.queries

    @property
    def allowed(self) -> torch.Tensor | None:
        """bool [Nk]: keys of the class; None for all."""
        return None if self.key_class is None else classes.mask(self.layout, self.key_class)

    @property
    def key_count(self) -> int:
        return self.keys if self.key_class is None else classes.count(self.layout, self.key_class, 0, self.keys)

    def mass(self, last: int, k_pos: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`sampled_mass` of the last queries (of the query class) over all keys or those at k_pos; made once."""
        key = last, k_pos is None
        if key not in self.masses:
            last_row = None
            if self.query_class is None:
                last_row = self.queries - 1
                rows = torch.arange(max(0, self.queries - last), self.queries, dtype=torch.int32, device=self.q.device)
            else:
                at = classes.positions(self.layout, self.query_class, self.prefix, self.keys)
                rows = at[-last:] - self.prefix
                run = classes.spans(self.layout, self.query_class, self.prefix, self.keys)[-1]
                if run[1] - run[0] >= len(rows):
                    last_row = run[1] - 1 - self.prefix
            self.masses[key] = self.ops.sampled_mass(
                self.q, self.k, self.slots, self.heads, self.kv_head, rows, self.prefix, self.keys, k_pos, self.scale,
                last_row, self.team,
            )  # fmt: skip
        return self.masses[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What a recipe keeps of the keys it is for.

    Args:
        everything: all of them; nothing else counts then.
        sink: the first positions, in tokens.
        columns: bool [R, Nk] kept keys, `columns_most` at most (a bound known to the host), or None.
        bands: kept diagonals, `bands_most` buckets at most, or None.
        blocks: block scores to choose tiles from, or None.
        rest: the same of the keys that no column keeps, from what `Ops.clusters` gives in the order that they come to
            have; or None.
        rows: bool [R, Nq] queries to be computed with every key, `rows_most` at most, or None.
    """

    everything: bool = False
    sink: int = 0
    columns: torch.Tensor | None = None
    columns_most: int = 0
    bands: Bands | None = None
    blocks: Blocks | None = None
    rest: Callable[[torch.Tensor, torch.Tensor], Blocks] | None = None
    rows: torch.Tensor | None = None
    rows_most: int = 0


# (class, number): of a chunk's queries of that class (None: of any) the last so many (None: all).
Looked = tuple[tuple[str | None, int | None], ...]


@dataclass(frozen=True, kw_only=True)
class HeadPattern:
    """Base of the recipes; subclasses add budgets (in tokens) and `select`.

    Args:
        residual: tiles that are not computed count as one mean key each (kernels/merge/residual_reference.py).
            Default: false.
    """

    kind: ClassVar[str]
    budgets: ClassVar[tuple[str, ...]] = ()  # fields that say how much is kept
    residual: bool = False

    def scaled(self, factor: float) -> Self:
        """The same recipe with `factor` times the budgets, at least 1 of each."""
        return replace(self, **{name: max(1, round(getattr(self, name) * factor)) for name in self.budgets})

    def select(self, view: View) -> Selection:
        """What to keep in this chunk."""
        raise NotImplementedError

    def parts(self, query_class: str | None) -> Iterable[tuple[str | None, HeadPattern]]:
        """(key class, recipe) pairs for queries of a class; most recipes know no classes."""
        return ((None, self),)

    def looks_at(self, layout: TokenLayout, queries: int) -> Looked:
        """Queries that are read beside each tile's own for its own: by `select`, or as rows that are gathered.

        Whoever holds a part of a chunk's `queries`, the layout's last ones, has to fetch these before planning.
        """
        return ()

    @property
    def query_classes(self) -> tuple[str | None, ...]:
        """Query classes that have recipes of their own."""
        return (None,)

    def to_dict(self) -> dict[str, Any]:
        return {"pattern": self.kind} | {f.name: getattr(self, f.name) for f in fields(self)}


def require_at_least(pattern: HeadPattern, minimum: int, *names: str) -> None:
    """ValueError for budgets that are not whole numbers or are too small to mean anything."""
    for name in names:
        value = getattr(pattern, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{pattern.kind}: {name}={value!r}: needs a whole number of at least {minimum}")


def require_coverage(pattern: HeadPattern, value: object) -> None:
    """ValueError unless None or a share above 0 and up to 1."""
    if value is not None and not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1):
        raise ValueError(f"{pattern.kind}: coverage={value!r}: needs a number above 0 and up to 1, or none")


def require_flag(pattern: HeadPattern, *names: str) -> None:
    """ValueError for anything but true and false."""
    for name in names:
        if not isinstance(getattr(pattern, name), bool):
            raise ValueError(f"{pattern.kind}: {name}={getattr(pattern, name)!r}: needs true or false")
