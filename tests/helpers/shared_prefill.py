"""One rank of a prefill that several processes share, or the whole of it alone; attention's inputs are random.

python shared_prefill.py RANK SIZE FOLDER [--gpu]     processes meet in FOLDER; each writes RANK-SIZE.pt there
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from recipes import BLOCKS, FRAME, SLASH

from mm_sglang.batches import SparseChunk
from mm_sglang.config import AssumedVideo
from mm_sglang.context_parallel.attention import ChunkShare, SharedBatch
from mm_sglang.context_parallel.collectives import Ranks
from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.inspection import tiles_by_head
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import head_pattern
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.layout import assumed_video
from mm_sglang.parallel.sharding import Sharding

# Query and KV heads, dimension, tokens of a chunk and of the prompt: two whole chunks and a rest.
SMALL = {"heads": (12, 4), "dim": 16, "chunk": 700, "tokens": 1700, "frame": (4, 6), "dtype": torch.float32}
LARGE = {"heads": (28, 4), "dim": 128, "chunk": 32768, "tokens": 100_000, "frame": (14, 14), "dtype": torch.bfloat16}
TAIL = 100
# Of each KV head in turn.
RECIPES: tuple[dict[str, Any], ...] = (
    SLASH | {"coverage": 0.9, "columns": 300, "last_q": 70}, FRAME, BLOCKS, SLASH | {"boundary": "2d"},
)  # fmt: skip


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    gpu = "--gpu" in sys.argv
    case: dict[str, Any] = LARGE if gpu else SMALL
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if size > 1:
        meet = f"file://{folder}/meet-{size}"
        dist.init_process_group("nccl" if gpu else "gloo", init_method=meet, rank=rank, world_size=size)
    ranks = Ranks(rank=rank, size=size, group=dist.group.WORLD if size > 1 else None, cpu_group=None)
    dim, tokens, (heads, kv_heads) = case["dim"], case["tokens"], case["heads"]
    share = heads // kv_heads
    patterns = [head_pattern(RECIPES[(head // share) % 4]) for head in range(heads)]
    patterns[0] = head_pattern(BLOCKS)  # its KV head's other heads have another recipe
    generator = torch.Generator(device).manual_seed(5)
    q = torch.randn(tokens, heads, dim, generator=generator, device=device, dtype=case["dtype"])
    k, v = torch.randn(2, tokens, kv_heads, dim, generator=generator, device=device, dtype=case["dtype"])
    slots = (torch.randperm(tokens, generator=generator, device=device) + 1).int()
    rows, cols = case["frame"]
    video = AssumedVideo(frames=16, rows=rows, cols=cols, text=130)
    runs = engine("fa4" if gpu else "reference")
    pools = torch.full((2, tokens + 1, kv_heads, dim), torch.nan, device=device, dtype=case["dtype"])
    parts, planned, began = [], [], time.perf_counter()
    for start in range(0, tokens, case["chunk"]):
        end = min(start + case["chunk"], tokens)
        layout = assumed_video(video, end, device)
        if size == 1:
            pools[0][slots[start:end].long()], pools[1][slots[start:end].long()] = k[start:end], v[start:end]
            out, _, plan = sparse_prefill(
                q[start:end],
                *pools,
                layout=layout,
                patterns=patterns,
                scale=0.2,
                engine=runs,
                slots=slots[:end],
                tail=TAIL,
            )
        else:
            out, plan = _together(ranks, q[start:end], k[start:end], v[start:end], pools, layout, slots, patterns, runs)
        parts.append(out)
        planned.append(tiles_by_head(plan))
    torch.save({"out": torch.cat(parts).cpu(), "tiles": planned}, folder / f"{rank}-{size}.pt")
    print(f"rank {rank} of {size}: {time.perf_counter() - began:.2f} s", flush=True)
    if size > 1:
        dist.destroy_process_group()


def _together(
    ranks: Ranks, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pools: torch.Tensor, layout: TokenLayout,
    slots: torch.Tensor, patterns: list[Any], runs: Any,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """All rows of the chunk's output, gathered, as the backend and SGLang's runner do it."""
    sharding = Sharding(lengths=(len(q),), size=ranks.size, kind="stripe")
    width = max(sharding.counts)
    slots = slots[: layout.length]
    chunk = SparseChunk(request=0, rid="0", start=0, end=len(q), layout=layout, slots=slots)
    batch = SharedBatch.of(ranks, sharding, width, [chunk], slots[-len(q) :], TAIL)
    own = sharding.rows(ranks.rank).to(q.device)
    q_own, k_own, v_own = (
        torch.nn.functional.pad(x[own], (0, 0, 0, 0, 0, width - len(own))) for x in (q, k, v)
    )  # fmt: skip
    finish_queries = batch.start_queries(q_own, [patterns])
    finish_keys = batch.start(k_own, pools[0])
    queries = finish_queries()
    finish_values = batch.start(v_own, pools[1])
    finish_keys()
    out = torch.empty_like(queries)
    _, _, plan = sparse_prefill(
        queries[:-1], *pools, layout=layout, patterns=patterns, scale=0.2, engine=runs, slots=slots, out=out[:-1],
        tail=TAIL,
        share=ChunkShare(batch=batch, chunk=0, start=0, out=out, values=finish_values),
    )  # fmt: skip
    order = sharding.inverse(width).to(q.device)
    return ranks.gather(batch.local(out))().index_select(0, order), plan


if __name__ == "__main__":
    main()
