"""Frames over ranks and in slices: every frame once, in order, balanced by cost; a wrapped tower gives the same."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random
from threading import Barrier

import pytest
import torch

from mm_sglang.compat import vision_slices
from mm_sglang.compat.vision_slices import encode_in_slices
from mm_sglang.context_parallel.collectives import Ranks
from mm_sglang.parallel.vision import QUADRATIC, frame_shares, patches, slices


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


@pytest.mark.parametrize("seed", range(20))
def test_slices_hold_whole_frames_in_order_and_no_more_than_asked(seed: int) -> None:
    draw = Random(seed)
    grids = [(draw.randint(1, 40), draw.randint(1, 60), draw.randint(1, 60)) for _ in range(draw.randint(1, 5))]
    share, most = frame_shares(grids, 2)[seed % 2], draw.randint(1, 20_000)
    pieces = slices(grids, share, most)
    frames = [[(f.item, n) for f in piece for n in range(f.first, f.last)] for piece in pieces]
    assert [frame for piece in frames for frame in piece] == [
        (f.item, n) for f in share for n in range(f.first, f.last)
    ]
    assert all(patches(grids, piece) <= most or len(held) == 1 for piece, held in zip(pieces, frames, strict=True))
    for piece, after in zip(frames, pieces[1:], strict=False):  # nor less: the next frame would not have fitted
        held = sum(grids[item][1] * grids[item][2] for item, _ in piece)
        assert held + grids[after[0].item][1] * grids[after[0].item][2] > most


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
        self.seen, self.most = 0, 0

    def forward(self, x: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        assert len(x) == int(grid_thw.prod(1).sum())
        self.seen, self.most, out, start = self.seen + len(x), max(self.most, len(x)), [], 0
        for t, h, w in grid_thw.tolist():
            frames = x[start : start + t * h * w].view(t, h * w // 4, -1)
            out.append((frames.sum(2, keepdim=True) + frames.sum((1, 2), keepdim=True)).expand(-1, -1, 3).flatten(0, 1))
            start += t * h * w
        return torch.cat(out)


GRIDS = [[(5, 4, 6), (1, 2, 2), (3, 8, 2)], [(1, 4, 4)], [(7, 10, 10), (2, 2, 4)]]


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("most", [1, 50, 1 << 16])
def test_ranks_together_encode_what_one_does(
    grids: list[tuple[int, int, int]], size: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a thread of its own: a gather returns when all ranks have brought their part."""
    grid = torch.tensor(grids)
    x = torch.arange(int(grid.prod(1).sum()) * 2.0).view(-1, 2)
    want = Tower().forward(x, grid)
    towers, parts = [Tower() for _ in range(size)], [torch.empty(0)] * size
    barrier = Barrier(size, timeout=60)

    def gather(self: Ranks, part: torch.Tensor) -> Callable[[], torch.Tensor]:
        parts[self.rank] = part.clone()
        barrier.wait()
        whole = torch.cat(parts)
        barrier.wait()  # before the next round's parts
        return lambda: whole

    monkeypatch.setattr(Ranks, "gather", gather)
    monkeypatch.setattr(vision_slices, "PATCHES", most)

    def encode(rank: int) -> torch.Tensor:
        encode_in_slices(towers[rank], Ranks(rank=rank, size=size, group=None, cpu_group=None))
        return towers[rank].forward(x, grid_thw=grid)

    with ThreadPoolExecutor(size) as threads:
        assert all(torch.equal(got, want) for got in threads.map(encode, range(size)))
    assert sum(tower.seen for tower in towers) == len(x)
    assert max(tower.most for tower in towers) <= max(most, *(h * w for _, h, w in grids))
    alone = Tower()
    encode_in_slices(alone, None)
    assert torch.equal(alone.forward(x, grid_thw=grid), want)
    assert alone.most <= max(most, *(h * w for _, h, w in grids))
