"""What `python -m benchmarks.scaling` runs on a number of GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.ttft.model import TEXT
from benchmarks.ttft.parts import spec

PART = "scaling"
VISION_WEIGHTS = 675_000_000  # parameters of the vision tower, which every rank holds though no prompt needs it
ZIGZAG = "stock:zigzag"
CONTESTANTS = ("mm_sparse", "stock", ZIGZAG)  # a zigzag that hangs takes nothing but its own time


def text_model(folder: Path, layers: int) -> Path:
    """Where `make_text_model` writes zigzag's model."""
    return folder / f"{layers}-layers-text"


def specs(
    gpus: int, lengths: list[int], layers: int, chunk: int, only: list[str], folder: Path
) -> list[dict[str, Any]]:
    """For benchmarks.ttft.child: mm_sparse over `gpus` ranks, with a profile of the longest prompt, and stock.

    only: those of CONTESTANTS that are wanted.

    Stock on several GPUs is tensor parallelism, and its own zigzag context parallelism, both with FA3. Zigzag does not
    serve vision-language models (the runner embeds ids above the vocabulary), and Qwen2.5's attention is wrong under
    it, so it runs a Qwen3 of the same shape. SGLang splits that one's attention by rows and, with rows gathered in
    every layer, its MLP by weights.
    """
    ours, stock = (spec(PART, who, lengths, folder, layers=layers, chunk=chunk) for who in ("mm_sparse", "stock"))
    zigzag = stock | {"name": ZIGZAG, "arguments": dict(stock["arguments"])}
    ours |= {"profile": lengths[-1], "repeats": 2}  # the first of a length compiles a few kernels
    if gpus > 1:
        spread = {
            "tp_size": gpus, "attn_cp_size": gpus, "enable_prefill_cp": True,
            "cuda_graph_backend_prefill": "disabled",  # SGLang cannot replay them here
        }  # fmt: skip
        ours["arguments"] |= spread | {"cp_strategy": "interleave", "mm_enable_dp_encoder": True}
        stock["arguments"] |= {"tp_size": gpus}
        zigzag["arguments"] |= spread | {"cp_strategy": "zigzag", "model_path": str(text_model(folder, layers))}
    return [one for one in (ours, stock, zigzag) if one["name"] in only and (gpus > 1 or one is not zigzag)]


def require_room(spec: dict[str, Any], total: int) -> None:
    """ValueError if weights, keys and values need more of a GPU's `total` bytes than SGLang is told to take.

    It would start with fewer tokens, and refuse the prompt a minute and a half later.
    """
    arguments, hidden, heads = spec["arguments"], TEXT["hidden_size"], TEXT["num_attention_heads"]
    kv_heads, head_dim = TEXT["num_key_value_heads"], TEXT["head_dim"]
    layer = hidden * (2 * (heads + kv_heads) * head_dim + 3 * TEXT["intermediate_size"])
    weights = 2 * (spec["layers"] * layer + 2 * TEXT["vocab_size"] * hidden + VISION_WEIGHTS)
    kv = 4 * spec["layers"] * kv_heads * head_dim * arguments["max_total_tokens"]
    split = 1 if "attn_cp_size" in arguments else arguments.get("tp_size", 1)
    needs, has = (weights + kv) / split, arguments["mem_fraction_static"] * total
    if needs > has:
        raise ValueError(
            f"{spec['name']} with {spec['layers']} layers and {max(spec['lengths'])} tokens: weights, keys and values "
            f"need {needs / 1e9:.0f} GB of a GPU, {has / 1e9:.0f} GB are for them: needs fewer --layers or --lengths"
        )
