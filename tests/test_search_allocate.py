"""How a layer's tiles are shared out among its heads: against brute force, equal shares, and what can't be kept to."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mm_sglang.search.allocate import STEPS, allocate


def total(table: np.ndarray, chosen: list[int]) -> float:
    return float(table[np.arange(len(table)), chosen].sum())


@pytest.mark.parametrize("seed", range(30))
def test_it_is_as_good_as_brute_force_and_keeps_to_the_target(seed: int) -> None:
    """Costs rounded up to a step a head can lose against the optimum only what a little less of the target loses."""
    random = np.random.default_rng(seed)
    heads, options, target = 4, 5, 0.1
    cost, loss = random.uniform(0.01, 0.4, (heads, options)), random.uniform(0, 1, (heads, options))
    cost[:, 0] = random.uniform(0.01, 0.09, heads)
    every = [list(chosen) for chosen in product(range(options), repeat=heads)]

    def best(budget: float) -> float:
        return min(total(loss, chosen) for chosen in every if total(cost, chosen) <= heads * budget)

    chosen = allocate(cost, loss, target)
    assert total(cost, chosen) <= heads * target * (1 + 1e-9)
    assert best(target) <= total(loss, chosen) <= best(target * (1 - 1 / STEPS))


def test_heads_that_need_little_pay_for_those_that_need_much() -> None:
    cost = np.tile([0.02, 0.05, 0.1, 0.2, 0.4], (8, 1))
    easy, hard = [0.001, 0.0005, 0.0, 0.0, 0.0], [0.9, 0.8, 0.6, 0.1, 0.0]
    loss = np.array([easy] * 5 + [hard] * 3)
    chosen = allocate(cost, loss, 0.1)
    assert total(loss, chosen) < 0.35 < total(loss, [2] * 8) == pytest.approx(1.8)
    assert {cost[0, option] for option in chosen[5:]} == {0.2} and total(cost, chosen) <= 0.8 + 1e-9


def test_costs_of_exactly_the_target_are_kept() -> None:
    assert allocate([[0.1, 0.2]] * 3, [[0.5, 0.0]] * 3, 0.1) == [0, 0, 0]
    assert allocate([[0.3, 0.1]] * 7, [[0.0, 0.5]] * 7, 0.3) == [0] * 7


def test_a_target_under_the_cheapest_options_is_refused() -> None:
    cost, loss = [[0.4, 0.3], [0.1, 0.5]], [[0.0, 0.9], [0.9, 0.0]]
    assert allocate(cost, loss, 0.201) == [1, 0]
    with pytest.raises(ValueError, match=r"target 0.19: needs at least 0.2008"):
        allocate(cost, loss, 0.19)


def test_tables_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cost \(1, 2\), loss \(2,\): needs \[H, O\]"):
        allocate([[0.1, 0.2]], [0.1, 0.2], 0.1)
