"""With real budgets: what a server computed is the softmax over the brute-force masks, from the same q, k, v.

The masks need a layout: it comes from transformers' processor, not from the server, and must equal the server's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import brute_force
import pytest
import torch
from asking import FORKED
from assets import Assets
from hf_reference import HuggingFace

from mm_sglang.config import TEXT_TAIL
from mm_sglang.demo.client import ask
from mm_sglang.demo.server import Server
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.layout import layout_from_processor
from mm_sglang.serve import server_command
from mm_sglang.trace import read_trace

pytestmark = pytest.mark.e2e

CHUNK = 320  # two and a half tiles: chunks end inside tiles and inside frames
LAYERS = (1, 3)
SLASH = {"pattern": "vertical_slash", "columns": 60, "slashes": 40, "sink": 8, "local": 40, "last_q": 48}
GRID = {
    "pattern": "grid", "stride": "frame", "lines": 2, "vertical": True, "horizontal": True,
    "sink": 8, "local": 64, "last_q": 64,
}  # fmt: skip
A_SHAPE = {"pattern": "a_shape", "sink": 8, "local": 100}
HEADS: dict[int, dict[str, Any]] = {
    0: SLASH,
    1: SLASH,
    2: GRID,
    3: A_SHAPE,
    4: GRID,
    5: {"pattern": "dense"},
    6: SLASH,
    7: GRID,
}
SETTINGS = {
    "default": A_SHAPE,
    "layers": {str(layer): {"heads": {str(h): r for h, r in HEADS.items()}} for layer in LAYERS},
    "min_tokens": 1,
}


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen3_vl"])
def test_output_is_the_softmax_over_the_brute_force_masks(architecture: str, assets: Assets) -> None:
    trace = assets.folder / f"trace-real-{architecture}"
    settings = SETTINGS | {"trace": {"dir": str(trace), "tensors": list(LAYERS)}}
    model = assets.models[architecture]
    extra = ["--dtype", "float32", "--max-total-tokens", "16384", "--chunked-prefill-size", str(CHUNK)]
    extra += ["--json-model-override-args", json.dumps({"mm_sparse": settings})]
    command, environment = server_command(str(model), config=None, extra=extra, cores=1)
    with Server(command, environment | FORKED, assets.folder / f"real-{architecture}.log") as server:
        server.flush_cache()  # SGLang's own warm-up request left a prefix: here every chunk is to be seen
        answer = ask(server.url, assets.prompts["mixed"], 4)
    assert len(answer.tokens) == 4

    lines = [line for line in read_trace(trace) if line["layer"] in LAYERS]
    rid = max(lines, key=lambda line: int(line["prefix"]))["rid"]  # the warm-up request is there too
    lines = [line for line in lines if line["rid"] == rid]
    layout = processor_layout(model, assets)
    assert layout.length == answer.prompt_tokens
    assert sum(line["queries"] for line in lines if line["layer"] == 1) == answer.prompt_tokens
    assert {group["pattern"]["pattern"] for line in lines for group in line["groups"]} == {
        "dense", "a_shape", "vertical_slash", "grid", "text_tail",
    }  # fmt: skip
    sparse = sum(g["tiles"] for line in lines for g in line["groups"] if g["pattern"]["pattern"] != "dense")
    assert sparse < sum(
        g["causal_tiles"] for line in lines for g in line["groups"] if g["pattern"]["pattern"] != "dense"
    )
    for line in lines:
        check_chunk(line, torch.load(trace / line["tensors"], weights_only=True), layout)


def processor_layout(model: Path, assets: Assets) -> TokenLayout:
    hugging_face = HuggingFace(model)
    config = hugging_face.model.config
    return layout_from_processor(
        hugging_face.inputs(assets.prompts["mixed"]),
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        merge=config.vision_config.spatial_merge_size,
    )


def check_chunk(line: dict[str, Any], saved: dict[str, torch.Tensor], layout: TokenLayout) -> None:
    prefix, keys = line["prefix"], line["prefix"] + line["queries"]
    ours = TokenLayout(items=line["items"], length=keys)
    assert torch.equal(ours.coordinates, layout.coordinates[:, :keys])
    q, k, v, out = (saved[name].double() for name in ("q", "k", "v", "out"))
    scale, share = q.shape[2] ** -0.5, q.shape[1] // k.shape[1]
    assert out.isfinite().all() and len(k) == keys
    prompt = brute_force.Prompt(
        q=q.numpy(), k=k.numpy(), scale=scale, what=[tuple(c) for c in layout.coordinates[1:, :keys].T.tolist()],
        grids=[(item.frames, item.rows, item.cols) for item in layout.items if item.spans[0][0] < keys],
    )  # fmt: skip
    masks = brute_force.attended_by_head(list(HEADS.values()), prompt)
    shown = max((end for i in line["items"] if i.spans[0][0] < keys for _, end in i.spans), default=0)
    tail = max(0, min(TEXT_TAIL, len(q), keys - shown))
    for head in HEADS:
        mask = torch.from_numpy(masks[head]).clone()
        mask[len(q) - tail :] = torch.ones(tail, keys, dtype=torch.bool).tril(keys - tail)
        logits = (q[:, head] @ k[:, head // share].T * scale).masked_fill(~mask, float("-inf"))
        want = logits.softmax(-1) @ v[:, head // share]
        torchs = torch.nn.functional.scaled_dot_product_attention(
            saved["q"][None, :, head],
            saved["k"][None, :, head // share],
            saved["v"][None, :, head // share],
            attn_mask=mask,
        )[0]
        error, allowed = (float((x.double() - want).norm() / want.norm()) for x in (out[:, head], torchs))
        assert error <= 2 * allowed, (line["layer"], prefix, head, error, allowed)
