"""The small model: architecture, first weights, the files of its folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.tiny_model.config import Sizes
from benchmarks.tiny_model.words import tokenizer
from mm_sglang.demo.tiny_model import SPECIAL, save_processor

PARAMETERS = 12_400_000  # at most: bf16 then takes less than 24 MiB
POSITIONS = 1 << 20
ROPE_THETA, MROPE_SECTION = 1e6, (8, 12, 12)
LIKENESS, CLOSENESS = 1.7, 6.0  # of a query and a key that match, by content or by distance
# Tokens, of one head each. Early layers within a sentence: from a code to its owner, from a question's last colour to
# its first one or its corner. Later layers from where an answer stands to the word that its question asks by.
LOOKS_BACK = ((1, 2, 3, 4), (6, 7, 8, 1))


def new_model(sizes: Sizes, seed: int) -> Any:
    """Qwen2_5_VLForConditionalGeneration in fp32 with weights that learn retrieval fast.

    Raises:
        ValueError: more than PARAMETERS parameters.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {token: tokenizer().convert_tokens_to_ids(token) for token in SPECIAL}
    text = dict(
        vocab_size=-(-len(tokenizer()) // 64) * 64, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        head_dim=64, max_position_embeddings=POSITIONS, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": list(MROPE_SECTION)},
        eos_token_id=ids["<|im_end|>"], bos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"],
    )  # fmt: skip
    vision = dict(
        depth=sizes.vision_depth, hidden_size=sizes.vision_hidden, intermediate_size=sizes.vision_intermediate,
        num_heads=sizes.vision_heads, in_channels=3, spatial_merge_size=2, temporal_patch_size=2, patch_size=14,
        out_hidden_size=sizes.hidden, tokens_per_second=2, window_size=112,
        fullatt_block_indexes=list(sizes.vision_full),
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > PARAMETERS:
        raise ValueError(f"sizes={sizes}: {count} parameters, needs at most {PARAMETERS}")
    _initialise(model, sizes, seed)
    model.config.architectures = [type(model).__name__]
    return model


@torch.no_grad()
def _initialise(model: Any, sizes: Sizes, seed: int) -> None:
    """Unit-variance maps, residual writes small; the language model's attention as in `_looks_for_the_like`."""
    source = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if "norm" in name or "ln_q" in name else 0.0)
            if name.endswith("bias"):
                parameter.zero_()
            continue
        gain = 1.0
        if "language" in name and ("q_proj" in name or "k_proj" in name):
            gain = 0.15
        elif any(part in name for part in ("o_proj", "down_proj", "attn.proj")):
            gain = (2 * (sizes.layers if "language" in name else sizes.vision_depth)) ** -0.5
        std = 0.5 if "embed_tokens" in name else gain * parameter[0].numel() ** -0.5
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=source))
    words = model.get_input_embeddings().weight
    model.lm_head.weight.copy_(words * (10 / words.square().sum(1).median()))
    for number, layer in enumerate(model.model.language_model.layers):
        _looks_for_the_like(layer.self_attn, sizes, number, source)


def _looks_for_the_like(attention: Any, sizes: Sizes, layer: int, source: torch.Generator) -> None:
    """Queries equal keys, outputs undo values; after Trockman and Kolter, Mimetic Initialization (arXiv 2305.09828).

    Half of the heads compare content, in the rotary pairs of columns, which hardly turn within a million positions. The
    others look a few tokens back: constant queries and keys in the pairs of time and row, turned by that distance.
    """
    hidden, width, group = sizes.hidden, 64, sizes.heads // sizes.kv_heads
    query, key, value, out = (getattr(attention, f"{name}_proj") for name in "qkvo")
    turning = torch.arange(sum(MROPE_SECTION[:2]))
    still = torch.tensor([at for at in range(width) if at % (width // 2) >= len(turning)])
    frequency = ROPE_THETA ** (-2 * turning / width)
    later = 2 * layer >= sizes.layers
    backs = itertools.islice(itertools.cycle(LOOKS_BACK[later]), layer * sizes.heads // 2, None)
    for kv in range(sizes.kv_heads):
        same, kept = (
            torch.empty(rows, hidden).normal_(0.0, hidden**-0.5, generator=source) for rows in (len(still), width)
        )
        key.weight[kv * width + still] = same * LIKENESS
        key.bias[kv * width + turning] = CLOSENESS
        value.weight[kv * width : (kv + 1) * width] = kept
        for head in range(kv * group, (kv + 1) * group):
            content = head % 2 == 0
            query.weight[head * width + still] = same * (LIKENESS if content else 0.0)
            out.weight[:, head * width : (head + 1) * width] = kept.t() * (0.7 if content else 0.35)
            if not content:
                angle = frequency * next(backs)
                query.bias[head * width + turning] = CLOSENESS * angle.cos()
                query.bias[head * width + width // 2 + turning] = -CLOSENESS * angle.sin()


def save_files(folder: Path) -> None:
    """Tokenizer and processor files, as the real repositories ship them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(folder)
    save_processor("qwen2_5_vl", folder)


def export(model: Any, folder: Path) -> int:
    """Write a whole model folder in bf16, weights in files of at most 12 MB; returns the bytes of its weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    save_files(folder)
    config = Qwen2_5_VLConfig.from_dict(model.config.to_dict())  # without the attention that training registered
    copy = Qwen2_5_VLForConditionalGeneration(config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder, max_shard_size="12MB")
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings.pop("dtype", None)  # transformers 5's name; SGLang and older versions read torch_dtype, and so does 5
    path.write_text(json.dumps(settings | {"torch_dtype": "bfloat16"}, indent=2))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
