"""What `python -m benchmarks.ttft` runs: one spec for child.py each, by part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.kernels.cases import PAPER_GRID, PAPER_SLASH, K, fitted
from benchmarks.kernels.planted import KINDS
from benchmarks.ttft.model import LAYERS, TEXT
from mm_sglang.config import default_config

GROUP = TEXT["num_attention_heads"] // TEXT["num_key_value_heads"]
VIDEO = {"frames": 16, "rows": 14, "cols": 14, "text": 512}  # as benchmarks/kernels/planted.py lays out "mix"
LENGTHS = (8 * K, 32 * K, 128 * K, 256 * K, 512 * K, 1024 * K)
CHUNK = 32 * K
PARTS = {
    "whole": f"all {LAYERS} layers, 128K to 1M, and a profile of one prefill of the longest",
    "ttft": "4 layers, 8K to 1M, decode, and 16 short chats while 512K prefill",
    "mixed": "4 layers, the same chats with SGLang's --enable-mixed-chunk",
    "chunks": "4 layers, chunks of 8K to 128K tokens",
    "probe": "4 layers, a recall probe of every layer and chunk",
    "question": "4 layers, a video, the same with a question after it, and a question about a video in the radix cache",
    "defaults": "4 layers, the settings that apply when none are given: every head chooses for itself",
}
QUESTION = 64  # tokens


def settings(kind: str, layers: int = LAYERS) -> dict[str, Any]:
    """mm_sparse's settings: "mix" is benchmarks/kernels' mix of heads, "paper" MMInference's budgets.

    "probe" is the mix with its recall watched in every layer and chunk. "defaults" are what applies without settings,
    with a guard that measures as often but finds every head good: it would make heads of dummy weights, which look
    everywhere, dense.
    """
    if kind == "defaults":
        given: dict[str, Any] = yaml.safe_load(default_config().read_text())
        return given | {"guard": given["guard"] | {"coverage": 1e-9}, "assume_video": VIDEO}
    recipes = [PAPER_SLASH, PAPER_GRID] * 2 if kind == "paper" else [fitted(name, 0) for name in KINDS[:4]]
    heads = {str(head): recipes[head // GROUP] for head in range(TEXT["num_attention_heads"])}
    by_layer = {str(layer): {"heads": heads} for layer in range(layers)}
    out = {"default": {"pattern": "dense"}, "layers": by_layer, "min_tokens": 16 * K, "assume_video": VIDEO}
    return out | {"probe": {"every": 1}} if kind == "probe" else out


def spec(
    part: str, who: str, lengths: list[int], folder: Path, *, layers: int = 4, chunk: int = CHUNK, mixed: bool = False
) -> dict[str, Any]:
    """For child.py. who: "stock", "mm_sparse" or "mm_sparse:paper"; folder: holds a model of each number of layers."""
    longest = max(lengths)
    arguments: dict[str, Any] = {
        "model_path": str(folder / f"{layers}-layers"), "load_format": "dummy", "dtype": "bfloat16",
        "disable_radix_cache": True, "context_length": longest + 4096, "max_total_tokens": longest + 65536,
        "page_size": 1, "mem_fraction_static": 0.75, "cuda_graph_max_bs_decode": 16, "max_running_requests": 32,
        "random_seed": 0, "log_level": "warning", "watchdog_timeout": 1200, "chunked_prefill_size": chunk,
        "max_prefill_tokens": chunk,
    }  # fmt: skip
    arguments |= {"enable_mixed_chunk": True} if mixed else {}
    if who == "stock":
        arguments |= {"prefill_attention_backend": "fa3", "decode_attention_backend": "flashinfer"}
    else:
        own = settings(who.partition(":")[2] or "mix", layers)
        arguments |= {"attention_backend": "mm_sparse", "json_model_override_args": json.dumps({"mm_sparse": own})}
    return {
        "part": part, "name": who, "layers": layers, "chunk": chunk, "mixed_chunk": mixed, "arguments": arguments,
        "lengths": lengths, "repeats": 3 if part == "ttft" else 1,
        "repeats_long": 1 if who == "stock" else 2,  # past 256K; ours compiles a few kernels at its first ones
        "growth": 2 if who == "stock" else 1.25,  # of seconds with tokens, to guess what a longer prompt takes
        "warm_up": sorted({4 * K, 32 * K, min(longest, 2 * chunk + 128)}),
    }  # fmt: skip


def specs(parts: list[str], longest: int, folder: Path, rivals: list[str]) -> list[dict[str, Any]]:
    """All runs of the parts, the longest to take first: several GPUs share them out."""

    def upto(*lengths: int) -> list[int]:
        return [n for n in lengths if n <= longest] or [longest]

    chats = {"tokens": min(longest, 512 * K), "chats": 16, "chat_tokens": 512, "new": 3000}
    out: list[dict[str, Any]] = []
    for who in rivals:
        if "whole" in parts:
            out.append(spec("whole", who, upto(*LENGTHS[2:]), folder, layers=LAYERS))
            out[-1] |= {"profile": out[-1]["lengths"][-1]} if who != "stock" else {}
        if "ttft" in parts:
            out.append(spec("ttft", who, upto(*LENGTHS), folder))
            out[-1] |= {"decode": {"tokens": 32 * K, "new": 257}, "mixed": chats}
        if "mixed" in parts:
            out.append(spec("mixed", who, upto(32 * K), folder, mixed=True))
            arguments = out[-1]["arguments"]
            arguments["context_length"] = arguments["max_total_tokens"] = chats["tokens"] + 65536
            out[-1] |= {"mixed": chats, "warm_up": [32 * K, chats["tokens"]]}
    if "chunks" in parts:
        for chunk in (8 * K, 16 * K, 32 * K, 64 * K, 128 * K):
            out += [spec("chunks", who, upto(128 * K, 512 * K, 1024 * K), folder, chunk=chunk) for who in rivals
                    if who != "stock"]  # fmt: skip
            if "stock" in rivals and chunk in (8 * K, 128 * K):
                out.append(spec("chunks", "stock", upto(128 * K, 512 * K), folder, chunk=chunk))
    turn = VIDEO["frames"] * VIDEO["rows"] * VIDEO["cols"] + VIDEO["text"]
    for who in rivals if "question" in parts else ():
        whole = [n - n % turn - VIDEO["text"] for n in upto(128 * K, 512 * K, 1024 * K)]  # each ends with a video
        out.append(spec("question", who, whole, folder))
        out[-1] |= {"questions": {"tokens": whole, "more": QUESTION}, "lengths": []}
        out[-1]["arguments"]["disable_radix_cache"] = False
    ours_or_stock = dict.fromkeys("stock" if who == "stock" else "mm_sparse:defaults" for who in rivals)
    for name in ours_or_stock if "defaults" in parts else ():
        out.append(spec("defaults", name, upto(64 * K, *LENGTHS[2:]), folder))
    if "probe" in parts:
        out.append(spec("probe", "mm_sparse:probe", upto(128 * K, 512 * K, 1024 * K), folder))
    return sorted(out, key=lambda s: list(PARTS).index(s["part"]))
