"""--max-video-tokens: the limits it lifts, the memory it counts, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mm_sglang.demo.tiny_model import make_tiny_model
from mm_sglang.kernels.layout import VIDEO, TokenLayout, consume_grids
from mm_sglang.long_video import CHUNK, STAMP, TEXT, encoded_again, long_video, video_limits
from mm_sglang.memory import RUNTIME, Needs, require_room, static_fraction
from mm_sglang.serve import server_command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("long") / "model", layers=3)  # hidden 256, 2 KV heads of 32


def test_limits_and_memory_of_a_million_tokens(model: Path) -> None:
    lifted = long_video(str(model), 1 << 20)
    video = json.loads(lifted.flags["--mm-process-config"])["video"]
    assert video["total_pixels"] == (1 << 20) * 28 * 28  # a merged token is 28 x 28 pixels of two frames
    assert video["max_frames"] == 2 * (1 << 20) // 128
    assert int(lifted.flags["--context-length"]) == (1 << 20) + TEXT
    cache = int(lifted.environment["SGLANG_VLM_CACHE_SIZE_MB"]) << 20
    assert cache == lifted.needs.embedding >= (1 << 20) * 256 * 2
    of_layer = 2 * 2 * 32 * 2  # keys and values of 2 heads of 32
    assert lifted.needs.keys_and_values == 3 * of_layer * ((1 << 20) + TEXT)
    assert long_video(str(model), 1 << 20, ranks=2).needs.keys_and_values * 2 == lifted.needs.keys_and_values
    spread = long_video(str(model), 1 << 20, spread=4)
    assert spread.flags["--chunked-prefill-size"] == spread.flags["--max-prefill-tokens"] == str(4 * CHUNK)
    assert spread.needs.keys_and_values == lifted.needs.keys_and_values  # whole on each rank
    gathered = 4 * CHUNK * (of_layer + 2 * 8 * 32 * 2)  # keys, values, queries and output of 8 heads of 32
    embeddings = 3 * CHUNK * 256 * 2  # the other ranks'
    assert spread.needs.activations - lifted.needs.activations == gathered + embeddings
    slice_ = (1 << 16) * (2 * (10 * 64 + 3 * 128) + 6 * 3 * 2 * 14 * 14)
    assert lifted.needs.vision == ((1 << 20) + (1 << 14)) * 256 * 2 + slice_
    assert spread.needs.vision - lifted.needs.vision == 4 * (1 << 14) * 256 * 2  # a slice of each rank, gathered
    assert lifted.needs.weights == sum(f.stat().st_size for f in model.glob("*.safetensors")) > 0
    assert long_video(str(model), 1 << 20, cache_mb=9).needs.embedding == 9 << 20
    assert long_video(str(model), 1 << 20, chunk=CHUNK // 2).needs.activations < lifted.needs.activations
    assert long_video(str(model), 4096, chunk=-1).flags["--max-prefill-tokens"] == str(4096 + TEXT)  # all at once


def test_weights_that_are_not_here_are_counted_from_the_configuration(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    here, elsewhere = (long_video(str(folder), 4096).needs.weights for folder in (model, tmp_path))
    assert 0.98 < 2 * elsewhere / here < 1.0  # bf16 of fp32, less the file's header


def test_frames_of_qwen3_vl_bring_their_time_as_text(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", architecture="qwen3_vl")
    lifted = long_video(str(folder), 1 << 16)
    assert int(lifted.flags["--context-length"]) == (1 << 16) + TEXT + STAMP * (1 << 16) // 128
    assert lifted.needs.embedding >= (1 << 16) * 256 * 3 * 2  # and two deepstack features


SIZES = [(1080, 1920), (720, 1280), (224, 224), (320, 320), (317, 319), (64, 64), (2160, 3840), (100, 1000), (40, 1200),
         (28, 1700), (30, 1790), (56, 900), (1200, 60), (333, 777)]  # fmt: skip


@pytest.mark.parametrize("tokens", [1024, 4096, 9999, 1 << 17, 1 << 20])
@pytest.mark.parametrize("seconds", [3, 31, 300, 20_000])
def test_no_video_has_more_tokens_than_asked_for(tokens: int, seconds: int) -> None:
    """Through SGLang's and transformers' own arithmetic, of videos of any length and size."""
    from sglang.srt.multimodal.processors.qwen_vl import preprocess_video
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper
    from transformers.models.qwen2_vl import video_processing_qwen2_vl as qwen2
    from transformers.models.qwen3_vl import video_processing_qwen3_vl as qwen3

    class Video(VideoDecoderWrapper):  # type: ignore[misc]
        avg_fps = 25.0

        def __init__(self, size: tuple[int, int]) -> None:
            self.size = size

        def __len__(self) -> int:
            return 25 * seconds

        def get_frames_as_tensor(self, indices: list[int]) -> Any:
            return torch.empty(len(indices), *self.size, 3, dtype=torch.uint8, device="meta")

        def close(self) -> None:
            pass

    for side in (28, 32):
        limits = video_limits(tokens, side)
        bounds = {"min_pixels": limits["size"]["shortest_edge"], "max_pixels": limits["size"]["longest_edge"]}
        most = 0
        for size in SIZES:
            frames, _ = asyncio.run(preprocess_video(Video(size), video_config=limits))
            count, _, height, width = frames.shape
            if side == 28:
                height, width = qwen2.smart_resize(height, width, factor=side, **bounds)
            else:
                height, width = qwen3.smart_resize(count, height, width, factor=side, **bounds)
            shown = -(-count // 2) * height * width // side**2
            assert shown <= tokens, (side, size, count)
            most = max(most, shown)
        assert most >= min(
            0.8 * tokens, 500 * seconds
        )  # nor far fewer; a second's two frames have 588 of 32 x 32 at most


def test_the_command_holds_the_flags_and_a_flag_of_the_users_wins(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_VLM_CACHE_SIZE_MB", raising=False)
    command, environment = server_command(
        str(model), config=None, extra=["--watchdog-timeout", "77"], cores=2, max_video_tokens=65536
    )
    assert command[command.index("--chunked-prefill-size") + 1] == str(CHUNK)
    assert command.count("--watchdog-timeout") == 1 and command[command.index("--watchdog-timeout") + 1] == "77"
    assert environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] == "1" and "SGLANG_VLM_CACHE_SIZE_MB" in environment


def test_ranks_that_share_a_chunk_get_longer_ones(model: Path) -> None:
    command, _ = server_command(str(model), config=None, extra=[], cores=2, max_video_tokens=65536, context_parallel=2)
    assert command[command.index("--chunked-prefill-size") + 1] == str(2 * CHUNK)


def test_too_little_memory_is_refused_in_bytes_and_tokens() -> None:
    gb = 10**9
    needs = Needs(
        tokens=10**6, weights=5 * gb, keys_and_values=50 * gb, embedding=2 * gb, activations=gb, vision=3 * gb
    )
    assert needs.total == 60 * gb + RUNTIME
    require_room(needs, needs.total)
    with pytest.raises(ValueError, match="room for 900000 tokens: needs fewer tokens, or more ranks"):
        require_room(needs, needs.total - 5 * gb)
    assert static_fraction(needs, 100 * gb) == pytest.approx(1 - needs.rest / (100 * gb), abs=1e-4)
    assert static_fraction(needs, 100 * gb) <= 1 - needs.rest / (100 * gb)
    require_room(needs, 100 * gb, 0.85)  # what the user gives is what is counted
    with pytest.raises(ValueError, match="50.0 GB of it by --mem-fraction-static 0.5, room for 860"):
        require_room(needs, 100 * gb, 0.5)
    with pytest.raises(ValueError, match=r"0.97 leaves 3.0 GB for a chunk .* needs 0.89 at most, or smaller chunks"):
        require_room(needs, 100 * gb, 0.97)


def test_a_gpu_that_is_known_gets_its_share_set(model: Path) -> None:
    assert "--mem-fraction-static" not in long_video(str(model), 4096).flags
    lifted = long_video(str(model), 4096, free=100 << 30)
    assert lifted.flags["--mem-fraction-static"] == str(static_fraction(lifted.needs, 100 << 30))
    with pytest.raises(ValueError, match="the GPU has 4.3 GB free"):
        long_video(str(model), 4096, free=4 << 30)


def test_a_video_that_the_vision_cache_does_not_hold_is_named() -> None:
    text, vision = SimpleNamespace(hidden_size=1024), SimpleNamespace(deepstack_visual_indexes=[0, 1])
    items = tuple(consume_grids(VIDEO, [(16, 64, 64)], [(10, 10 + 16 * 1024)], 2))
    layout = TokenLayout(items=items, length=20_000)
    size = 16 * 1024 * 1024 * 3 * 2 >> 20  # 96 MB
    assert encoded_again(layout, 4096, text, vision, size) is None
    assert encoded_again(layout, 20_000, text, vision, 1) is None  # one chunk encodes it once anyway
    assert encoded_again(TokenLayout(items=(), length=20_000), 4096, text, vision, 0) is None
    message = encoded_again(layout, 4096, text, vision, size - 1)
    assert message is not None and "16384 tokens has an embedding of 96 MB, SGLang's vision cache holds 95" in message


def test_bad_input_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ValueError, match="--max-video-tokens 5: needs at least 1024"):
        long_video(str(model), 5)
    with pytest.raises(ValueError, match="--max-video-tokens: model"):
        long_video(str(tmp_path), 4096)
