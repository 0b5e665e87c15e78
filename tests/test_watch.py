"""What the server says of its sparse prefills, and the guard: on the CPU, with the reference engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mm_sglang.config import Guard, Probe, SparseConfig
from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.inspection import attended, tile_counts, tile_counts_on_device
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import AShape, Dense, head_pattern
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.metrics import Metrics
from mm_sglang.watch import Done, GuardedRecipes, Later, Watch, recall_by_head

REFERENCE = engine("reference")
QUIET = Metrics(on=False)


class Heard(Metrics):
    """Metrics that remember instead of counting."""

    def __init__(self) -> None:
        super().__init__(on=False)
        self.on = True
        self.calls: list[tuple[Any, ...]] = []

    def __getattribute__(self, name: str) -> Any:
        if name in ("sparse_chunk", "dense_chunk", "tiles", "stages", "recall", "guarded"):
            return lambda *given: self.calls.append((name, *given))
        return super().__getattribute__(name)


def done(prefix: int, queries: int, patterns: Any, layer: int = 0) -> tuple[Done, torch.Tensor]:
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(queries, 2, 16, generator=generator)
    pool = torch.randn(prefix + queries + 20, 1, 16, generator=generator)
    slots = torch.randperm(len(pool), generator=generator)[: prefix + queries].int()
    layout = TokenLayout(items=(), length=prefix + queries)
    _, lse, plan = sparse_prefill(
        q, pool, pool, layout=layout, patterns=patterns, scale=0.5, engine=REFERENCE, slots=slots
    )
    k = pool[slots.long(), 0]
    causal = torch.ones(queries, prefix + queries, dtype=torch.bool).tril(prefix)
    weights = [(q[:, h] @ k.T * 0.5).masked_fill(~causal, float("-inf")).softmax(1) for h in range(2)]
    share = torch.stack([(w * attended(plan, h)).sum(1) for h, w in enumerate(weights)])
    made = Done(layer=layer, q=q, lse=lse, pool=pool, slots=slots, layout=layout, plan=plan, scale=0.5)
    return made, share


def test_recall_is_the_share_of_the_dense_softmax() -> None:
    made, share = done(500, 300, [AShape(sink=8, local=64), Dense()])
    rows = [150 + (n + 1) * 150 // 4 - 1 for n in range(4)]
    torch.testing.assert_close(recall_by_head(made, 4, REFERENCE), share[:, rows].mean(1), rtol=1e-4, atol=1e-5)
    assert recall_by_head(done(0, 1, [Dense(), Dense()])[0], 16, REFERENCE).tolist() == pytest.approx([1.0, 1.0])


def test_tiles_are_counted_where_they_are() -> None:
    plan = done(500, 300, [AShape(sink=8, local=64), Dense()])[0].plan
    assert int(tile_counts_on_device(plan)) == sum(tile_counts(group)[0] for group in plan.groups)


def test_the_guard_doubles_budgets_and_then_goes_dense() -> None:
    a, b = AShape(sink=8, local=64), head_pattern({"pattern": "vertical_slash", "columns": 100, "slashes": 256})
    heard = Heard()
    guarded = GuardedRecipes([None, (a, b, Dense())], Guard(coverage=0.9, grow=2), heard)
    guarded.judge(0, torch.zeros(3))  # a dense layer has nothing to guard
    guarded.judge(1, torch.tensor([0.95, 0.5, 0.1]))
    assert guarded.now[1] == (a, b.scaled(2), Dense())
    assert guarded.now[1][1].to_dict() == b.to_dict() | {"columns": 200, "slashes": 512}
    guarded.judge(1, torch.tensor([0.95, 0.5, 0.1]))
    guarded.judge(1, torch.tensor([0.2, 0.5, 0.1]))
    assert guarded.now[1] == (a.scaled(2), Dense(), Dense())
    guarded.judge(1, torch.tensor([0.95, 0.5, 0.1]))  # dense is the end
    assert [call[1] for call in heard.calls] == ["grown", "grown", "grown", "dense"]


def test_without_a_guard_nothing_changes() -> None:
    recipes = (AShape(sink=8, local=64),)
    guarded = GuardedRecipes([recipes], None, QUIET)
    guarded.judge(0, torch.tensor([0.0]))
    assert guarded.now == [recipes]


def test_a_batch_is_counted_and_one_layer_sampled_in_turn() -> None:
    heard, recipes = Heard(), (AShape(sink=8, local=64), Dense())
    config = SparseConfig(default=recipes[0], probe=Probe(every=2, rows=4), guard=Guard(coverage=0.999, grow=1))
    watch = Watch(config, [recipes, None, recipes], REFERENCE, heard, cuda=False, metered=True)
    for _ in range(1, 5):
        watch.begin([("too short", 7)], [300])
        for layer in (0, 2):
            watch.after(done(500, 300, watch.recipes.now[layer], layer)[0])
        assert watch.timer(0) is None  # no device clock on a CPU
    watch.begin([], [])
    watch.begin([], [])
    names = [call[0] for call in heard.calls]
    assert names.count("tiles") == 4 and names.count("recall") == 2 and names.count("dense_chunk") == 4
    assert [call[1] for call in heard.calls if call[0] == "guarded"] == ["grown", "grown", "dense", "dense"]
    assert all(call[1] <= call[2] for call in heard.calls if call[0] == "tiles")
    assert watch.recipes.now[0] == (Dense(), Dense())


def test_what_was_counted_is_used_two_batches_on() -> None:
    """Not when it arrives: context-parallel ranks have to act on it in the same batch."""
    used: list[int] = []
    later = Later()
    for batch in range(4):
        later.poll()
        later.put(torch.tensor(batch), lambda n: used.append(int(n)))
        assert used == list(range(batch - 1))


def test_ranks_without_metrics_of_their_own_probe_as_the_one_that_has_them() -> None:
    """All have to gather, or none."""
    probed = []
    for heard, metered in ((Heard(), True), (QUIET, True), (QUIET, False)):
        recipes = (AShape(sink=8, local=64), Dense())
        config = SparseConfig(default=recipes[0], probe=Probe(every=1, rows=4))
        watch = Watch(config, [recipes, recipes], REFERENCE, heard, cuda=False, metered=metered)
        seen: list[int] = []
        watch.later.put = lambda values, use, seen=seen: seen.append(len(values)) if values.ndim else None  # type: ignore[method-assign,misc]
        for _ in range(2):
            watch.begin([], [300])
            for layer in (0, 1):
                watch.after(done(500, 300, recipes, layer)[0])
        probed.append(len(seen))
    assert probed == [2, 2, 4]


@pytest.mark.parametrize(
    "section, message",
    [
        ({"guard": {}}, "guard: needs the key 'coverage'"),
        ({"guard": {"coverage": 1.5}}, "guard: coverage=1.5: needs a number between 0 and 1"),
        ({"guard": {"coverage": 0.9, "grow": -1}}, "guard: grow=-1: needs a whole number from 0 to 16"),
        ({"probe": {"every": 0}}, "probe: every=0: needs a whole number of at least 1"),
        ({"probe": {"often": 3}}, "probe: unknown key 'often'"),
        ({"assume_video": {"rows": 0}}, "assume_video: rows=0: needs a whole number of at least 1"),
    ],
)
def test_sections_that_are_wrong_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConfig.from_mapping({"default": {"pattern": "dense"}} | section)
