"""Frames over ranks: every frame once, in order, balanced by cost; and the wrapped tower gives what it gives alone."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch

from mm_sglang.compat.cp_vision import share_frames
from mm_sglang.context_parallel.collectives import Ranks
from mm_sglang.parallel.vision import QUADRATIC, frame_shares, patches


@pytest.mark.parametrize("seed", range(40))
def test_every_frame_once_in_order_and_in_balance(seed: int) -> None:
    draw = Random(seed)
    grids = [(draw.randint(1, 40), draw.randint(1, 200), draw.randint(1, 200)) for _ in range(draw.randint(1, 5))]
    size = draw.randint(1, 9)
    shares = frame_shares(grids, size)
    assert len(shares) == size
    flat = [(f.item, n) for share in shares for f in share for n in range(f.first, f.last)]
    assert flat == [(item, n) for item, grid in enumerate(grids) for n in range(grid[0])]
    assert sum(patches(grids, share) for share in shares) == sum(t * h * w for t, h, w in grids)
    cost = [h * w * (QUADRATIC + h * w) for _, h, w in grids]
    by_rank = [sum(cost[f.item] * (f.last - f.first) for f in share) for share in shares]
    assert max(by_rank) <= sum(by_rank) / size + max(cost)  # within a frame


def test_a_long_video_is_split_evenly() -> None:
    counts = [patches([(1000, 28, 28)], share) // 784 for share in frame_shares([(1000, 28, 28)], 3)]
    assert counts == [333, 334, 333]


@pytest.mark.parametrize(
    "grids, size, message",
    [([(1, 2, 2)], 0, "size=0: needs at least one rank"), ([(0, 2, 2)], 2, r"grid \(0, 2, 2\): needs frames")],
)
def test_bad_shares_are_refused(grids: list[tuple[int, int, int]], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frame_shares(grids, size)


class Tower:
    """Merges 2 x 2 patches; a frame's tokens know the whole frame and nothing else."""

    spatial_merge_size, out_hidden_size, dtype, device = 2, 3, torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        self.seen = 0

    def forward(self, x: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        assert len(x) == int(grid_thw.prod(1).sum())
        self.seen, out, start = self.seen + len(x), [], 0
        for t, h, w in grid_thw.tolist():
            frames = x[start : start + t * h * w].view(t, h * w // 4, -1)
            out.append((frames.sum(2, keepdim=True) + frames.sum((1, 2), keepdim=True)).expand(-1, -1, 3).flatten(0, 1))
            start += t * h * w
        return torch.cat(out)


@pytest.mark.parametrize("grids", [[(5, 4, 6), (1, 2, 2), (3, 8, 2)], [(1, 4, 4)]])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_together_encode_what_one_does(
    grids: list[tuple[int, int, int]], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = torch.tensor(grids)
    x = torch.arange(int(grid.prod(1).sum()) * 2.0).view(-1, 2)
    want = Tower().forward(x, grid)
    towers, parts = [Tower() for _ in range(size)], []

    def gather(self: Ranks, part: torch.Tensor) -> Callable[[], torch.Tensor]:
        parts.append(part)
        return lambda: torch.cat(parts if len(parts) == size else [part] * size)

    monkeypatch.setattr(Ranks, "gather", gather)
    for rank, tower in enumerate(towers):
        share_frames(tower, Ranks(rank=rank, size=size, group=None, cpu_group=None))
        got = tower.forward(x, grid_thw=grid)
    assert torch.equal(got, want)  # the last rank's, who has everybody's parts
    assert sum(tower.seen for tower in towers) == len(x)
