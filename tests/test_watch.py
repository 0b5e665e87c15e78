"""What the server says of its sparse prefills, and the guard: on the CPU, with the reference engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from mm_sglang.config import Guard, Probe, SparseConfig
from mm_sglang.guard import PATIENCE, GuardedRecipes
from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.inspection import attended, tile_counts, tile_counts_on_device
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import AShape, Dense, HeadPattern, head_pattern
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.metrics import Metrics
from mm_sglang.watch import Done, Later, Watch, recall_by_head

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


class Alone:
    """A team of one."""

    rank, size = 0, 1

    def gather(self, part: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: part


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


def judge(guarded: GuardedRecipes, layer: int, *shares: float) -> None:
    guarded.judge(layer, torch.tensor(shares), guarded.levels(layer))


def test_the_guard_doubles_budgets_and_then_goes_dense() -> None:
    a, b = AShape(sink=8, local=64), head_pattern({"pattern": "vertical_slash", "columns": 100, "slashes": 256})
    heard = Heard()
    guarded = GuardedRecipes([None, (a, b, Dense())], Guard(coverage=0.9, grow=2), heard)
    guarded.judge(0, torch.zeros(3), guarded.levels(0))  # a dense layer has nothing to guard
    judge(guarded, 1, 0.95, 0.5, 0.1)
    assert guarded.now[1] == (a, b.scaled(2), Dense())
    assert guarded.now[1][1].to_dict() == b.to_dict() | {"columns": 200, "slashes": 512}
    judge(guarded, 1, 0.95, 0.5, 0.1)
    judge(guarded, 1, 0.2, 0.5, 0.1)
    assert guarded.now[1] == (a.scaled(2), Dense(), Dense())
    judge(guarded, 1, 0.95, 0.5, 0.1)  # dense is the end
    assert [call[1] for call in heard.calls] == ["grown", "grown", "grown", "dense"]


def test_a_setting_forbids_dense_heads() -> None:
    recipe = AShape(sink=8, local=64)
    guarded = GuardedRecipes([(recipe,)], Guard(coverage=0.9, grow=2, dense=False), QUIET)
    for _ in range(5):
        judge(guarded, 0, 0.1)
    assert guarded.now[0] == (recipe.scaled(4),)


def test_what_was_measured_of_another_recipe_says_nothing() -> None:
    recipe = AShape(sink=8, local=64)
    guarded = GuardedRecipes([(recipe, recipe)], Guard(coverage=0.9), QUIET)
    before = guarded.levels(0)
    judge(guarded, 0, 0.1, 0.95)
    guarded.judge(0, torch.tensor([0.1, 0.1]), before)  # the first head's recipe has changed since, the second's not
    assert guarded.levels(0) == (1, 1)


def test_a_head_comes_down_after_good_measurements_and_later_each_time_it_has_to_go_up_again() -> None:
    recipe, heard = AShape(sink=8, local=64), Heard()
    guarded = GuardedRecipes([(recipe,)], Guard(coverage=0.9, grow=1), heard)

    def now() -> HeadPattern:
        assert guarded.now[0] is not None
        return guarded.now[0][0]

    def good_ones_until_it_moves() -> int:
        level = guarded.levels(0)
        for count in range(1, 10_000):
            judge(guarded, 0, 0.96)
            if guarded.levels(0) != level:
                return count
        raise AssertionError("it never moves")

    judge(guarded, 0, 0.1)
    judge(guarded, 0, 0.1)
    assert now() == Dense()
    for _ in range(3 * PATIENCE):
        judge(guarded, 0, 0.94)  # over the mark, but by less than half of what is left
    assert now() == Dense()
    assert good_ones_until_it_moves() == PATIENCE and now() == recipe.scaled(2)
    assert good_ones_until_it_moves() == PATIENCE and now() == recipe
    for times in (2, 4, 8):
        judge(guarded, 0, 0.1)
        assert now() == recipe.scaled(2)
        assert good_ones_until_it_moves() == times * PATIENCE
    assert [call[1] for call in heard.calls] == ["grown", "dense", "lowered", "lowered"] + ["grown", "lowered"] * 3


def test_without_a_guard_nothing_changes() -> None:
    recipes = (AShape(sink=8, local=64),)
    guarded = GuardedRecipes([recipes], None, QUIET)
    judge(guarded, 0, 0.0)
    assert guarded.now == [recipes]


def test_the_log_names_the_models_head_not_the_ranks(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="mm_sglang.guard")
    guarded = GuardedRecipes([(AShape(sink=8, local=64),) * 2], Guard(coverage=0.9), QUIET, first_head=14)
    judge(guarded, 0, 0.95, 0.1)
    assert "layer 0 head 15 has recall 0.100" in caplog.text


def test_a_request_is_counted_once_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import prometheus_client

    from mm_sglang import metrics as module

    monkeypatch.setattr(module, "REMEMBERED", 2)
    registry = prometheus_client.CollectorRegistry()
    for kind in ("Counter", "Gauge"):
        real = getattr(prometheus_client, kind)
        monkeypatch.setattr(prometheus_client, kind, partial(real, registry=registry))
    counted = Metrics(on=True)

    def requests(reason: str) -> float | None:
        return registry.get_sample_value("mm_sglang:dense_requests_total", {"reason": reason})

    for reason, rid in (("short", "a"), ("short", "a"), ("short", "b"), ("odd", "a"), ("short", "b")):
        counted.dense_chunk(reason, 7, rid)
    assert (requests("short"), requests("odd")) == (2, 1)
    assert registry.get_sample_value("mm_sglang:dense_chunks_total", {"reason": "short"}) == 4
    assert len(counted._counted) == 2  # however many requests a server has


def test_a_batch_is_counted_and_one_layer_sampled_in_turn() -> None:
    heard, recipes = Heard(), (AShape(sink=8, local=64), Dense())
    config = SparseConfig(default=recipes[0], probe=Probe(every=2, rows=4), guard=Guard(coverage=0.999, grow=1))
    watch = Watch(config, [recipes, None, recipes], REFERENCE, heard, cuda=False, metered=True)
    for _ in range(1, 5):
        watch.begin([("too short", 7, "a")], [300])
        for layer in (0, 2):
            watch.after(done(500, 300, watch.recipes.now[layer], layer)[0])
        assert watch.timer(0) is None  # no device clock on a CPU
    watch.begin([], [])
    watch.begin([], [])
    names = [call[0] for call in heard.calls]
    assert names.count("tiles") == 4 and names.count("recall") == 2 and names.count("dense_chunk") == 4
    # Batch 1 raises both layers before batch 3, and 2 says nothing new; 3 makes them dense after batch 4
    assert [call[1] for call in heard.calls if call[0] == "guarded"] == ["grown", "grown", "dense", "dense"]
    assert all(call[1] <= call[2] for call in heard.calls if call[0] == "tiles")
    assert watch.recipes.now[0] == (Dense(), Dense())


def test_a_batch_is_one_judgement_by_its_poorest_chunk() -> None:
    """However many chunks it has, and not two for what ran before the first one could act."""
    heard, recipes = Heard(), (AShape(sink=8, local=64), Dense())
    config = SparseConfig(default=recipes[0], guard=Guard(coverage=0.999, grow=3))
    watch = Watch(config, [recipes], REFERENCE, heard, cuda=False, metered=False)
    levels = []
    for _ in range(5):
        watch.begin([], [300] * 4)
        levels.append(watch.recipes.levels(0)[0])
        for chunk in range(4):  # the last one is short enough for all of its keys
            prefix, queries = (0, 60) if chunk == 3 else (500, 300)
            watch.after(done(prefix, queries, watch.recipes.now[0])[0])
    assert levels == [0, 0, 1, 1, 2]
    assert [call[1] for call in heard.calls if call[0] == "guarded"] == ["grown", "grown"]


@pytest.mark.parametrize("every", [1, 2, 14, 16])
def test_the_probe_looks_at_every_layer_in_turn(every: int) -> None:
    config = SparseConfig(default=AShape(sink=8, local=64), probe=Probe(every=every))
    recipes = [None, *[(AShape(sink=8, local=64),)] * 28]
    watch = Watch(config, recipes, REFERENCE, Heard(), cuda=False, metered=True)
    probed = []
    for batch in range(1, 28 * every + 1):
        watch.begin([], [300])
        now = [layer for layer in range(1, 29) if watch._in_turn(layer, every)]
        assert len(now) == (batch % every == 0)
        probed += now
    assert sorted(probed) == list(range(1, 29))


def test_what_was_counted_is_used_two_batches_on() -> None:
    """Not when it arrives: context-parallel ranks have to act on it in the same batch."""
    used: list[int] = []
    later = Later()
    for batch in range(4):
        later.poll()
        later.put(torch.tensor(batch), lambda n: used.append(int(n)))
        assert used == list(range(batch - 1))


def test_a_probe_that_nobody_reads_is_not_computed() -> None:
    """Ranks of a team have to gather, all or none; a tensor-parallel rank without metrics has nobody to measure for."""
    probed = []
    for heard, metered, team in (
        (Heard(), True, None), (QUIET, True, None), (Heard(), True, Alone()), (QUIET, True, Alone()),
        (QUIET, False, Alone()), (QUIET, False, None),
    ):  # fmt: skip
        recipes = (AShape(sink=8, local=64), Dense())
        config = SparseConfig(default=recipes[0], probe=Probe(every=1, rows=4))
        watch = Watch(config, [recipes, recipes], REFERENCE, heard, cuda=False, metered=metered, team=team)
        seen: list[int] = []
        watch.later.put = lambda values, use, seen=seen: seen.append(len(values)) if values.ndim else None  # type: ignore[method-assign,misc]
        for _ in range(2):
            watch.begin([], [300])
            for layer in (0, 1):
                watch.after(done(500, 300, recipes, layer)[0])
        probed.append(len(seen))
    assert probed == [2, 0, 2, 2, 0, 0]


@pytest.mark.gpu
def test_metrics_and_guard_do_not_wait_for_the_device() -> None:
    """Stages, tiles and recall of three batches; the first compiles."""
    heard, recipes = Heard(), (AShape(sink=128, local=256), Dense())
    config = SparseConfig(default=recipes[0], probe=Probe(every=1), guard=Guard(coverage=0.999, grow=1))
    triton = engine("triton")
    q, pool = (torch.randn(n, h, 64, device="cuda", dtype=torch.bfloat16) for n, h in ((1000, 2), (2000, 1)))
    slots, layout = torch.arange(1500, device="cuda").int(), TokenLayout(items=(), length=1500, device=q.device)
    watch = Watch(config, [recipes], triton, heard, cuda=True, metered=True)

    def batch() -> None:
        watch.begin([], [1000])
        timer = watch.timer(0)
        assert timer is not None
        with timer:
            _, lse, plan = sparse_prefill(
                q, pool, pool, layout=layout, patterns=recipes, scale=0.1, engine=triton, slots=slots
            )
        watch.after(Done(layer=0, q=q, lse=lse, pool=pool, slots=slots, layout=layout, plan=plan, scale=0.1))

    batch()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            batch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # type: ignore[no-untyped-call]  # half a second
    batch()
    assert len(watch.timed) == 1  # whose stages the device has not come to
    torch.cuda.synchronize()
    watch.begin([], [])
    stages = [call[1] for call in heard.calls if call[0] == "stages"]
    assert len(stages) == 4 and all(s["attend"] > 0 and s["plan"] > 0 for s in stages)
    names = [call[0] for call in heard.calls]
    assert names.count("tiles") == 3 and names.count("recall") == 3 and "guarded" in names


@pytest.mark.parametrize(
    "section, message",
    [
        ({"guard": {}}, "guard: needs the key 'coverage'"),
        ({"guard": {"coverage": 1.5}}, "guard: coverage=1.5: needs a number between 0 and 1"),
        ({"guard": {"coverage": 0.9, "grow": -1}}, "guard: grow=-1: needs a whole number from 0 to 16"),
        ({"guard": {"coverage": 0.9, "dense": 1}}, "guard: dense=1: needs true, or false with grow from 1"),
        ({"guard": {"coverage": 0.9, "dense": False, "grow": 0}}, "guard: dense=False: needs true, or false"),
        ({"probe": {"every": 0}}, "probe: every=0: needs a whole number of at least 1"),
        ({"probe": {"often": 3}}, "probe: unknown key 'often'"),
        ({"assume_video": {"rows": 0}}, "assume_video: rows=0: needs a whole number of at least 1"),
    ],
)
def test_sections_that_are_wrong_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConfig.from_mapping({"default": {"pattern": "dense"}} | section)
