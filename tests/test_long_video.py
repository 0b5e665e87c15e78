"""--max-video-tokens: the limits it lifts, the memory it counts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mm_sglang.demo.tiny_model import make_tiny_model
from mm_sglang.kernels.layout import VIDEO, TokenLayout, consume_grids
from mm_sglang.long_video import CHUNK, TEXT, Needs, encoded_again, long_video, require_room
from mm_sglang.serve import server_command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("long") / "model", layers=3)  # hidden 256, 2 KV heads of 32


def test_limits_and_memory_of_a_million_tokens(model: Path) -> None:
    lifted = long_video(str(model), 1 << 20)
    video = json.loads(lifted.flags["--mm-process-config"])["video"]
    assert video["total_pixels"] == (1 << 20) * 28 * 28  # a merged token is 28 x 28 pixels of two frames
    assert video["max_frames"] >= 2 * (1 << 20) // 128
    assert int(lifted.flags["--context-length"]) == (1 << 20) + TEXT
    assert int(lifted.environment["SGLANG_VLM_CACHE_SIZE_MB"]) * (1 << 20) >= (1 << 20) * 256 * 2
    assert lifted.needs.keys_and_values == 2 * 3 * 2 * 32 * 2 * ((1 << 20) + TEXT)
    assert long_video(str(model), 1 << 20, ranks=2).needs.keys_and_values * 2 == lifted.needs.keys_and_values
    spread = long_video(str(model), 1 << 20, spread=4)
    assert spread.flags["--chunked-prefill-size"] == spread.flags["--max-prefill-tokens"] == str(4 * CHUNK)
    assert spread.needs.keys_and_values == lifted.needs.keys_and_values  # whole on each rank
    both = 2 * 4 * CHUNK * 8 * 32 * 2  # queries and output of 8 heads of 32
    assert spread.needs.activations - lifted.needs.activations == both
    assert lifted.needs.weights == sum(f.stat().st_size for f in model.glob("*.safetensors")) > 0


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
    needs = Needs(tokens=1000, weights=500, keys_and_values=100_000, embedding=300, activations=200)
    require_room(needs, 101_000)
    with pytest.raises(ValueError, match="room for 490 tokens: needs fewer tokens, or more ranks"):
        require_room(needs, 50_000)


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
