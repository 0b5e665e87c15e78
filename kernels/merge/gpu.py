"""GPU twin of merge/reference.py in Triton: memory-bound, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


# fmt: off
@triton.jit(do_not_specialize=["rows", "lse_head", "other_lse_head"])
def _merge(out_ptr, lse_ptr, other_ptr, other_lse_ptr, rows, out_row, out_head, lse_head, other_row, other_head,
           other_lse_head, D: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    a = tl.load(lse_ptr + head * lse_head + row, mask=live, other=float("-inf"))
    b = tl.load(other_lse_ptr + head * other_lse_head + row, mask=live, other=float("-inf"))
    top = tl.maximum(a, b)
    safe = tl.where(top == float("-inf"), 0.0, top)  # neither saw a key: both weights are 0
    first, second = tl.exp(a - safe), tl.exp(b - safe)
    total = first + second
    tl.store(lse_ptr + head * lse_head + row, safe + tl.log(total), mask=live)  # log(0) is -inf, as it should be
    scale = 1.0 / tl.where(total > 0, total, 1.0)
    dim = tl.arange(0, D)
    where = row.to(tl.int64)[:, None]
    mine = out_ptr + where * out_row + head * out_head + dim[None, :]
    x = tl.load(mine, mask=live[:, None], other=0.0).to(tl.float32)
    y = tl.load(other_ptr + where * other_row + head * other_head + dim[None, :], mask=live[:, None], other=0.0)
    y = y.to(tl.float32)
    tl.store(mine, x * (first * scale)[:, None] + y * (second * scale)[:, None], mask=live[:, None])
# fmt: on


def merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """As merge.reference.merge."""
    rows, heads, dim = out.shape
    _merge[(triton.cdiv(rows, 64), heads)](
        out, lse, other, other_lse, rows, out.stride(0), out.stride(1), lse.stride(0), other.stride(0),
        other.stride(1), other_lse.stride(0), D=dim, BLOCK=64, num_warps=4,
    )  # fmt: skip
