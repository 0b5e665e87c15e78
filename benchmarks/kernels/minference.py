"""MInference's vertical-slash attention (Triton), one head at a time as its own Python runs it.

Its package imports model code and FlashAttention-2 at once; so only the file with the kernel is loaded, from an
unpacked sdist that the environment variable MM_SGLANG_MINFERENCE points to. Its CUDA extension, which turns indices
into blocks, is taken from there if it has been built, and else built now.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import torch

VARIABLE = "MM_SGLANG_MINFERENCE"
COLUMNS, SLASHES, LAST_Q = 1000, 4096, 64  # the paper's budgets
HEADS_AT_LENGTH = 4  # past MOST_TOKENS only so many heads are run, and the time scaled by their number
MOST_TOKENS = 1 << 17


@cache
def load() -> Any:
    """The module with its kernel.

    Raises:
        RuntimeError: the variable is not set, or what it points to can't be built.
    """
    if not os.environ.get(VARIABLE):
        raise RuntimeError(f"{VARIABLE} is not set: needs the folder of an unpacked minference sdist")
    root = Path(os.environ[VARIABLE])
    source = root / "minference" / "ops" / "pit_sparse_flash_attention_v2.py"
    if not source.is_file():
        raise RuntimeError(f"{VARIABLE}={root}: has no {source.relative_to(root)}")
    cuda = _extension(root)
    for name in ("minference", "minference.ops"):  # bare packages, so that its relative import finds the extension
        sys.modules.setdefault(name, types.ModuleType(name)).__path__ = []
    sys.modules["minference.cuda"] = cuda
    spec = importlib.util.spec_from_file_location("minference.ops.pit_sparse_flash_attention_v2", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.sparse_attn_func = module.convert_vertical_slash_indexes_opt = None  # type: ignore[attr-defined] # Triton's
    return module


def _extension(root: Path) -> Any:
    """minference.cuda: as installed there, or built now (about a minute)."""
    for built in (*root.glob("minference/cuda*.so"), *root.glob("minference/cuda.py")):
        spec = importlib.util.spec_from_file_location("minference.cuda", built)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    from torch.utils import cpp_extension

    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    sources = [str(root / "csrc" / name) for name in ("kernels.cpp", "vertical_slash_index.cu")]
    return cpp_extension.load(name="mm_sglang_minference", sources=sources, extra_cflags=["-O1"])


def heads_run(tokens: int, heads: int) -> int:
    """How many of the query heads are run at this length."""
    return heads if tokens <= MOST_TOKENS else min(heads, HEADS_AT_LENGTH)


def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """[1, 1, N, D] tensors of each head, as it gets them from a model."""
    group = q.shape[1] // k.shape[1]
    keys, values = ([x[:, j].contiguous()[None, None] for j in range(x.shape[1])] for x in (k, v))
    step = q.shape[1] // (count := heads_run(len(q), q.shape[1]))
    return [
        (q[:, h].contiguous()[None, None], keys[h // group], values[h // group]) for h in range(0, step * count, step)
    ]


def run(heads: list[tuple[torch.Tensor, ...]], scale: float) -> torch.Tensor:
    """out [N, heads run, D]; its kernel knows no scale but 1 / sqrt(D)."""
    q = heads[0][0]
    if abs(scale - q.shape[3] ** -0.5) > 1e-6:
        raise ValueError(f"scale={scale}: needs 1 / sqrt({q.shape[3]})")
    attend = load().vertical_slash_sparse_attention
    return torch.cat([attend(*head, *_indices(head[0], head[1]))[0] for head in heads]).transpose(0, 1)


def _indices(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and distances by the attention of the last queries, in the same torch operations as its own."""
    tokens, last = q.shape[2], min(LAST_Q, q.shape[2])
    columns, slashes = min(tokens, COLUMNS), min(tokens, SLASHES)
    if tokens <= 1024:  # a test of it against dense attention
        columns = slashes = tokens
    weights = torch.einsum("bhmk, bhnk -> bhmn", q[:, :, -last:], k) / q.shape[3] ** 0.5
    causal = torch.ones(last, last, dtype=torch.bool, device=q.device).tril()
    weights[..., -last:] = torch.where(causal, weights[..., -last:], -torch.inf)
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32)
    vertical = weights.sum(-2, keepdim=True)
    vertical[..., :30] = torch.inf
    zeros = weights.new_zeros(1, 1, last, last)
    padded = torch.cat((zeros, weights, zeros), -1)
    width = 2 * last + tokens
    slash = padded.as_strided((1, 1, last, last + tokens), (1, last * width, width + 1, 1)).sum(2)[:, :, 1:][
        ..., : -last + 1
    ]
    slash[..., -100:] = torch.inf
    distances = (tokens - 1) - torch.topk(slash, slashes, -1).indices
    return torch.topk(vertical, columns, -1).indices, distances
