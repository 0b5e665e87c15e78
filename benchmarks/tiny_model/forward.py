"""The model's own layers without Python loops over frames: 512K patches take one attention call a window length.

Shapes: S patches in all, H heads, D a head's width, N tokens of a prompt, B prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

ATTENTION = "mm_tiny_flash"  # transformers hands a whole packed sequence only to a name with "flash" in it
SEQUENCES_AT_ONCE = 32768  # CUDA's limit of 65535 for a grid's second axis


def use_fast_attention(model: Any) -> None:
    """Have the vision tower attend through `segment_attention`, and the text through SDPA."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, segment_attention)
    model.model.visual.config._attn_implementation = ATTENTION


def segment_attention(
    module: Any,
    query: torch.Tensor,  # [1, H, S, D]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within segments, in one batch for all segments of one length."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, H, D]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for length, index in _groups(cu_seq_lens_q, query.device):
        if index is None:
            q, k, v = (x.view(-1, length, *x.shape[1:]) for x in (query, key, value))
        else:
            q, k, v = (x[index].view(-1, length, *x.shape[1:]) for x in (query, key, value))
        parts = [
            scaled_dot_product_attention(a, b, c, scale=scaling).transpose(1, 2)
            for a, b, c in zip(*(torch.split(x.transpose(1, 2), SEQUENCES_AT_ONCE) for x in (q, k, v)), strict=True)
        ]
        done = torch.cat(parts).flatten(0, 1)  # [S of this length, H, D]
        out = done if index is None else out.index_copy(0, index, done)
    return out[None], None


def _groups(bounds: torch.Tensor, device: torch.device) -> list[tuple[int, torch.Tensor | None]]:
    """(length, patches of the segments of this length, or None for all), kept on `bounds`, which all layers share."""
    known: list[tuple[int, torch.Tensor | None]] | None = getattr(bounds, "_groups", None)
    if known is None:
        on_cpu = bounds.cpu().long()
        starts, lengths = on_cpu[:-1], on_cpu.diff()
        sizes = sorted(set(lengths.tolist()))
        known = []
        for size in sizes:
            index = (starts[lengths == size][:, None] + torch.arange(size)).flatten()
            known.append((size, None if len(sizes) == 1 else index.to(device)))
        bounds._groups = known  # type: ignore[attr-defined]
    return known


def vision_features(model: Any, pixels: torch.Tensor, grids: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """The vision tower's tokens [S / 4, hidden]; index tensors come from the CPU, so that nothing waits for the GPU."""
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    visual = model.model.visual
    grid = torch.tensor(grids)
    index, bounds = get_vision_window_index(grid, visual.spatial_merge_size, visual.window_size, visual.patch_size)
    to = dict(device=pixels.device, non_blocking=True)
    lengths = bounds.diff()
    out = visual(
        pixels.to(visual.patch_embed.proj.weight.dtype),
        grid_thw=grid,
        position_ids=get_vision_position_ids(grid, visual.spatial_merge_size).to(**to),
        window_index=index.to(**to),
        cu_window_seqlens=bounds,
        max_seqlen=max(h * w for _, h, w in grids),
        max_window_seqlen=int(lengths.max()),
    )
    return out.pooler_output  # type: ignore[no-any-return]


def shown(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """What the vision tower makes of a batch (batches.Batch.tensors), in its places of [B, N, hidden]; 0 elsewhere.

    `pixels` holds the first clip of all B prompts, then the second of all; `kinds` and `grids` say what the clips are.
    """
    ids, grids, kinds = batch["input_ids"], batch["grids"], batch["kinds"]
    if not grids:
        return model.get_input_embeddings().weight.new_zeros(*ids.shape, model.config.text_config.hidden_size)  # type: ignore[no-any-return]
    merged = [(len(ids) * t, h, w) for t, h, w in grids]
    tokens = vision_features(model, batch["pixels"], merged).split([t * h * w // 4 for t, h, w in merged])  # type: ignore[no-untyped-call]
    out = torch.zeros(*ids.shape, tokens[0].shape[-1], dtype=tokens[0].dtype, device=ids.device)
    for kind, name in ((1, "image"), (2, "video")):
        mine = [part.unflatten(0, (len(ids), -1)) for part, is_a in zip(tokens, kinds, strict=True) if is_a == name]
        if mine:
            out = out.masked_scatter((batch["mm_token_type_ids"] == kind)[..., None], torch.cat(mine, 1))
    return out


def answer_logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Logits [A, vocabulary] that predict the answer tokens of a batch (batches.Batch.tensors)."""
    words = model.get_input_embeddings()(batch["input_ids"])
    embeds = torch.where((batch["mm_token_type_ids"] > 0)[..., None], shown(model, batch).to(words.dtype), words)
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch["predicts"]]).float()  # type: ignore[no-any-return]


def exact(logits: torch.Tensor, batch: dict[str, Any], turns: int) -> torch.Tensor:
    """For each turn whether the most likely token is right at every token of the answer, float [turns]."""
    right = (logits.argmax(-1) == batch["targets"]).float()
    return torch.ones(turns, device=right.device).scatter_reduce_(0, batch["turn"], right, "amin")
