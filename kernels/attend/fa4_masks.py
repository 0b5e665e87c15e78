"""Mask functions for FlashAttention-4's partial tiles: a slot is visible below the limit of its own segment.

One load a row and segment, none an element: limits stand in for positions because segments ascend. FA4's DSL reads
these functions' source, so they live in a module of their own. Legend: aux[0] limits int32 [R, S, rows], aux[1] start
int32 [R, S + 1]; the batch index is the order r.
"""

# mypy: ignore-errors
import cutlass
import cutlass.cute as cute
from flash_attn.cute.utils import scalar_to_ssa


@cute.jit
def one_segment(batch, head, q_idx, kv_idx, seqlen_info, aux):
    return kv_idx < scalar_to_ssa(aux[0][batch[0], 0, q_idx[0]], cutlass.Int32)


@cute.jit
def two_segments(batch, head, q_idx, kv_idx, seqlen_info, aux):
    limit0 = scalar_to_ssa(aux[0][batch[0], 0, q_idx[0]], cutlass.Int32)
    limit1 = scalar_to_ssa(aux[0][batch[0], 1, q_idx[0]], cutlass.Int32)
    start1 = scalar_to_ssa(aux[1][batch[0], 1], cutlass.Int32)
    return (kv_idx < limit0) | ((kv_idx >= start1) & (kv_idx < limit1))


@cute.jit
def three_segments(batch, head, q_idx, kv_idx, seqlen_info, aux):
    limit0 = scalar_to_ssa(aux[0][batch[0], 0, q_idx[0]], cutlass.Int32)
    limit1 = scalar_to_ssa(aux[0][batch[0], 1, q_idx[0]], cutlass.Int32)
    limit2 = scalar_to_ssa(aux[0][batch[0], 2, q_idx[0]], cutlass.Int32)
    start1 = scalar_to_ssa(aux[1][batch[0], 1], cutlass.Int32)
    start2 = scalar_to_ssa(aux[1][batch[0], 2], cutlass.Int32)
    early = (kv_idx < limit0) | ((kv_idx >= start1) & (kv_idx < limit1))
    return early | ((kv_idx >= start2) & (kv_idx < limit2))


MASKS = {1: one_segment, 2: two_segments, 3: three_segments}
