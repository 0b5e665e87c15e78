"""An estimate shared out among ranks has the bits of one alone, in both implementations, for any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' modules are imported

from mm_sglang.kernels.estimate import gpu, reference
from mm_sglang.kernels.share import Team

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = ((0, 1), (3, -1))  # of 2 KV heads, one with a filler
Mass = tuple[torch.Tensor, torch.Tensor]


class _Waits(Exception):
    """A rank has come to a gather whose other parts are not there yet."""


@dataclass
class Replayed:
    """One rank of a team whose ranks run one after another, again from the start after every gather."""

    rank: int
    size: int
    done: list[torch.Tensor]
    part: torch.Tensor | None = None
    called: int = field(default=0)

    def gather(self, part: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.called += 1
        if self.called <= len(self.done):
            return lambda: self.done[self.called - 1]
        self.part = part
        raise _Waits


def of_all(size: int, work: Callable[[Team], Mass]) -> tuple[list[Mass], int]:
    """What each rank gets, and the number of gathers."""
    done: list[torch.Tensor] = []
    while True:
        results, parts = [], []
        for rank in range(size):
            team = Replayed(rank, size, done)
            try:
                results.append(work(team))
            except _Waits:
                assert team.part is not None
                parts.append(team.part)
        assert not (results and parts), "some ranks gather and others don't"
        if results:
            return results, len(done)
        assert len({p.shape for p in parts}) == 1
        done.append(torch.cat(parts))


@pytest.mark.parametrize("run", [True, False], ids=["a run of queries", "queries anywhere"])
@pytest.mark.parametrize(
    "implementation, prefix, queries, sizes",
    [
        *((reference, prefix, queries, (2, 3, 8)) for prefix, queries in ((0, 1), (0, 300), (501, 200), (1000, 77))),
        (gpu, 142, 71, (3,)),  # 213 keys; more takes minutes in Triton's interpreter
    ],
)  # fmt: skip
def test_masses_have_the_bits_of_one_alone(
    implementation: object, prefix: int, queries: int, sizes: tuple[int, ...], run: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu, "TEAM_KEYS", 1)
    monkeypatch.setattr(gpu, "SPLIT", 64)
    generator = torch.Generator().manual_seed(prefix + queries)
    keys = prefix + queries
    slots = (torch.randperm(keys, generator=generator) + 3).int().to(DEVICE)
    q = torch.randn(queries, 6, 16, generator=generator).to(DEVICE)
    k = torch.randn(keys + 3, 3, 16, generator=generator).to(DEVICE)
    rows = torch.arange(max(0, queries - 67), queries, 1 if run else 9, dtype=torch.int32, device=DEVICE)
    last = queries - 1 if run else None

    def mass(team: Team | None) -> Mass:
        made: Mass = implementation.sampled_mass(  # type: ignore[attr-defined]
            q, k, slots, HEADS, (2, 0), rows, prefix, keys, None, 0.7, last, team
        )
        return made

    alone = mass(None)
    # every query of a head spreads a weight of one: over columns as a mean, over buckets as a sum
    torch.testing.assert_close(alone[0].sum(1), torch.ones(2, device=DEVICE))
    weight = torch.tensor([len(rows) * (h >= 0) for row in HEADS for h in row], device=DEVICE)
    torch.testing.assert_close(alone[1].sum(1), weight.float())
    for size in sizes:
        results, gathers = of_all(size, mass)
        assert gathers == (2 if implementation is gpu else 3)
        for got in results:
            assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))


def test_few_keys_are_not_worth_an_exchange_on_a_gpu() -> None:
    q = torch.randn(200, 6, 16, device=DEVICE)
    rows = torch.arange(136, 200, dtype=torch.int32, device=DEVICE)
    _, gathers = of_all(2, lambda team: gpu.sampled_mass(q, q, None, HEADS, (2, 0), rows, 0, 200, None, 1.0, 199, team))
    assert gathers == 0 and gpu.TEAM_KEYS > 200
