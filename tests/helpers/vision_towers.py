"""SGLang's own vision tower of one architecture, whole and in slices of uint8 pixels; run as a process of its own.

usage: vision_towers.py ARCHITECTURE FOLDER    (SGLang's groups and server arguments are a process's)
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

GRIDS = (
    [[9, 8, 12]],  # an odd number of frames; longer than any slice but the last
    [[3, 4, 6], [1, 8, 2], [5, 10, 4]],
    [[1, 20, 20], [7, 4, 4], [1, 6, 6], [1, 6, 8], [1, 8, 4], [1, 4, 8], [2, 4, 6]],  # a frame larger than a slice
)  # four tokens a frame at least: for fewer rows a CPU has other matrix products


def tower(architecture: str, folder: Path) -> Any:
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args, set_global_server_args_for_scheduler
    from transformers import AutoConfig

    load_plugins()
    flags = ["--device", "cpu", "--mm-attention-backend", "sdpa", "--attention-backend", "mm_sparse"]
    set_global_server_args_for_scheduler(prepare_server_args(["--model-path", str(folder), *flags]))
    method = f"file://{folder.parent / 'rendezvous'}"
    init_distributed_environment(
        world_size=1, rank=0, local_rank=0, distributed_init_method=method, backend="gloo"
    )  # fmt: skip
    initialize_model_parallel()
    if architecture == "qwen2_5_vl":
        from sglang.srt.models.qwen2_5_vl import Qwen2_5_VisionTransformer as Tower
    else:
        from sglang.srt.models.qwen3_vl import Qwen3VLMoeVisionModel as Tower
    made: Any = Tower(AutoConfig.from_pretrained(folder).vision_config, use_data_parallel=True)
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


@torch.no_grad()
def main(architecture: str, folder: Path) -> None:
    from mm_sglang.compat import uint8_pixels, vision_slices

    visual = tower(architecture, folder)
    whole, norm = visual.forward, ([120.0, 110.0, 100.0], [60.0, 61.0, 62.0])
    width = visual.patch_embed.proj.weight[0].numel()
    for dtype in (torch.float32, torch.bfloat16):
        visual.to(dtype)
        for grids in GRIDS:
            pixels = [torch.randint(0, 256, (t * h * w, width), dtype=torch.uint8) for t, h, w in grids]
            want = whole(uint8_pixels.normalised(torch.cat(pixels), norm, visual), torch.tensor(grids))
            items = [
                SimpleNamespace(feature=part, video_grid_thw=torch.tensor([grid]), is_video=lambda: True,
                                model_specific_data={uint8_pixels.NORM: norm})
                for part, grid in zip(pixels, grids, strict=True)
            ]  # fmt: skip
            for most in (1, 100, 300, 1 << 16):
                vision_slices.PATCHES = most
                visual.forward = whole
                vision_slices.encode_in_slices(visual, None)
                model = SimpleNamespace(visual=visual, use_data_parallel=False)
                got = uint8_pixels._feature(lambda *_: None, model, items)
                assert torch.equal(got, want), (dtype, grids, most, float((got - want).abs().max()))
            visual.forward = whole  # and where nothing wraps it
            assert torch.equal(uint8_pixels._feature(lambda *_: None, model, items), want)
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
