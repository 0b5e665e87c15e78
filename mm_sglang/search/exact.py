"""Dense attention of a few of a prompt's queries: what sparse outputs are measured by.

Legend: N tokens, H query heads, Hkv KV heads, D head dimension, L rows.
"""

from __future__ import annotations

import torch

from mm_sglang.kernels.attend.reference import dense_rows
from mm_sglang.kernels.inspection import recall
from mm_sglang.kernels.ops import Ops
from mm_sglang.kernels.plan import device_ints, evenly

ROWS = 64  # queries at which outputs are compared; of a shorter prompt, all


class Exact:
    """A layer's dense attention at ROWS queries, evenly spread up to the last one.

    Args:
        q: [N, H, D]; k, v: [N, Hkv, D], a whole prompt's.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, ops: Ops) -> None:
        rows = device_ints(evenly(len(q), ROWS), q.device)
        self.at = rows.long()
        self.lse = ops.row_lse(q, k, None, rows, 0, scale)  # fp32 [H, L]
        self.out = dense_rows(q, k, v, self.at, scale)  # fp32 [L, H, D]

    def norm(self) -> torch.Tensor:
        """fp32 [H] on the device: squared norm of the dense output."""
        return self.out.pow(2).sum((0, 2))

    def error(self, out: torch.Tensor) -> torch.Tensor:
        """fp32 [H] on the device: squared error of a sparse output [N, H, D]."""
        return (out[self.at].float() - self.out).pow(2).sum((0, 2))

    def recall(self, lse: torch.Tensor) -> torch.Tensor:
        """fp32 [H] on the device: mean share of the dense softmax attended, by a sparse prefill's own lse [N, H]."""
        return recall(lse[self.at].T, self.lse)
