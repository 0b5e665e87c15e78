"""The hooks into SGLang: their targets exist in the supported version, and each does what its file says."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import MultimodalInputFormat
from torch.nn.functional import scaled_dot_product_attention

import mm_sglang.compat
from mm_sglang.compat import (
    cp_body,
    cp_inputs,
    cpu_current_stream,
    cpu_last_loc,
    cpu_vision_segments,
    pinned_positions,
    qwen2_5_vl_frames,
    require_supported_sglang,
    uint8_pixels,
    video_errors,
)
from mm_sglang.demo.tiny_model import ARCHITECTURES, make_tiny_model
from mm_sglang.demo.video import scene_frames


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """HookRegistry.register, recording instead of patching this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks: dict[str, Any] = {}
    monkeypatch.setattr(HookRegistry, "register", lambda target, hook, kind: hooks.update({target: (hook, kind.name)}))
    return hooks


def test_every_hook_has_a_target_of_the_shape_it_expects(registered: dict[str, Any]) -> None:
    hooked = (
        cp_body, cpu_last_loc, cpu_vision_segments, pinned_positions, qwen2_5_vl_frames, uint8_pixels, video_errors
    )  # fmt: skip
    for module in hooked:
        module.install()
    assert len(registered) == 14
    for target, (hook, kind) in registered.items():
        original = list(inspect.signature(resolve_name(target)).parameters)
        ours = list(inspect.signature(hook).parameters)
        ours = ours[1:] if kind == "AROUND" else ours
        named = [name for name in ours if name not in ("args", "kwargs")]
        assert named == original[: len(named)], target


def test_an_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_supported_sglang() in mm_sglang.compat.SUPPORTED_SGLANG
    monkeypatch.setattr(mm_sglang.compat, "version", lambda name: "0.6.0")
    with pytest.raises(ValueError, match=r"sglang 0\.6\.0: mm_sglang needs one of"):
        require_supported_sglang()


@pytest.mark.parametrize("bounds", [[0, 7], [0, 4, 8, 12], [0, 0, 5, 5, 21, 26, 30]])
def test_segments_equal_attention_under_a_block_mask(bounds: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(bounds[-1], 4, 16, generator=generator)
    k, v = torch.randn(2, bounds[-1], 2, 16, generator=generator)
    segment = torch.bucketize(torch.arange(bounds[-1]), torch.tensor(bounds[1:]), right=True)
    mask = segment[:, None] == segment[None, :]
    q_, k_, v_ = (x.transpose(0, 1)[None] for x in (q, k, v))
    want = scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, scale=0.3, enable_gqa=True)[0].transpose(0, 1)
    got = cpu_vision_segments.attend_segments(q, k, v, torch.tensor(bounds, dtype=torch.int32), 0.3)
    torch.testing.assert_close(got, want)


def test_what_is_not_segments_takes_sglangs_own_path() -> None:
    class Attention:
        flatten_batch, softmax_in_single_precision, scale = True, False, 1.0

    x = torch.zeros(4, 1, 8)
    for bounds, mask in ((None, None), ([0, 3], None), ([1, 4], None), ([0, 4], torch.ones(4, 4))):
        seqlens = None if bounds is None else torch.tensor(bounds)
        answer = cpu_vision_segments._forward(
            lambda *a, **k: torch.ones(1), Attention(), x, x, x, 1, cu_seqlens=seqlens, attention_mask=mask
        )
        assert torch.equal(answer, torch.ones(1))


def test_a_video_is_handed_on_frame_by_frame_and_an_image_as_it_is() -> None:
    grid = torch.tensor([[3, 4, 6], [1, 8, 2]])
    assert qwen2_5_vl_frames.split_frames(grid).tolist() == [[1, 4, 6]] * 3 + [[1, 8, 2]]
    assert grid.tolist() == [[3, 4, 6], [1, 8, 2]]
    seen: list[torch.Tensor] = []
    for rows in ([[2, 4, 4]], [[1, 4, 4], [1, 2, 2]]):
        qwen2_5_vl_frames._forward(lambda self, x, g: seen.append(g), None, torch.zeros(1), torch.tensor(rows))
    assert [g.tolist() for g in seen] == [[[1, 4, 4]] * 2, [[1, 4, 4], [1, 2, 2]]]


def test_decoder_errors_become_one_line_of_ours() -> None:
    class Wrapper:
        def __len__(self) -> int:
            return 9

    def broken(*arguments: object) -> None:
        raise RuntimeError("[12:00] decoder.cc:98: Check failed\nStack trace:\n  0x7f")

    with pytest.raises(
        ValueError,
        match=r"^the video is truncated or damaged: reading 3 of its 9 frames failed \(.*98: Check failed\)$",
    ):
        video_errors._frames(broken, Wrapper(), [0, 1, 2])
    with pytest.raises(ValueError, match=r"^not a video, or truncated: no decoder opens it \(4 bytes: [^\n]*\)$"):
        video_errors._open(broken, Wrapper(), b"abcd")
    with pytest.raises(ValueError, match="the video is empty: got 0 bytes"):
        video_errors._open(broken, Wrapper(), b"")


def test_a_body_is_built_and_run_as_on_one_rank_only_with_context_parallelism_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sglang.srt.runtime_context as context

    seen: list[tuple[int, int, bool]] = []

    def note(*arguments: object) -> None:
        parallel = context.get_parallel()
        seen.append((parallel.tp_size, parallel.attn_cp_size, parallel.enable_prefill_cp))

    class Body:
        forward = note

    wide = dict(tp_size=2, tp_rank=1, attn_tp_size=1, attn_tp_rank=0, attn_dp_size=1, attn_cp_size=2, attn_cp_rank=1)
    wide |= dict(moe_tp_size=2, moe_tp_rank=1, moe_dp_size=1, moe_ep_size=1)
    with context.get_parallel().override(**wide, attn_tp_group=None, enable_prefill_cp=True):
        for backend in ("fa3", "mm_sparse"):
            monkeypatch.setattr(context, "attention_backends", lambda backend=backend: (backend, "flashinfer"))
            cp_body._init(note, Body())
        body = Body()
        cp_body.wrap_forward(body)
        body.forward()
        note()
    assert seen == [(2, 2, True), (1, 1, False), (1, 1, False), (2, 2, True)]


def test_positions_are_sglangs_own_and_sent_from_pinned_memory_with_mm_sparse_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sglang.srt.runtime_context as context
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    import mm_sglang.kernels.layout as layout

    original = ForwardBatch._compute_mrope_positions_extend
    monkeypatch.setattr(
        context, "get_exec", lambda: SimpleNamespace(deterministic=SimpleNamespace(rl_on_policy_target=None))
    )
    monkeypatch.setattr("sglang.srt.model_executor.forward_batch_info.get_exec", context.get_exec)
    sent: list[tuple[list[list[int]], Any]] = []

    def upload(host: torch.Tensor, device: Any) -> torch.Tensor:
        sent.append((host.tolist(), device))
        return host

    monkeypatch.setattr(layout, "upload", upload)
    media = SimpleNamespace(mrope_positions=torch.arange(30).view(3, 10))
    requests = [SimpleNamespace(session=None), SimpleNamespace(session=None)]
    batch = SimpleNamespace(multimodal_inputs=[None, media], extend_lens=[2, 3], prefix_lens=[4, 5], reqs=requests)
    want = [[4, 5, 5, 6, 7], [4, 5, 15, 16, 17], [4, 5, 25, 26, 27]]
    for backend, through in (("fa3", []), ("mm_sparse", [(want, "meta")])):
        monkeypatch.setattr(context, "attention_backends", lambda backend=backend: (backend, "flashinfer"))
        forward = SimpleNamespace(seq_lens_cpu=torch.tensor([6, 8]), mrope_positions=None)
        pinned_positions._extend(original, forward, SimpleNamespace(device="meta"), batch)
        assert sent == through and forward.mrope_positions.shape == (3, 5)


def test_a_context_parallel_model_gets_its_vision_mrope_and_sharded_deepstack(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.layers.cp.utils as cp_utils
    import sglang.srt.managers.mm_utils as mm_utils

    class Qwen3VLForConditionalGeneration:
        model, is_mrope_enabled, use_deepstack = "body", True, {"video": True}

    class Batch:
        input_ids, positions, mrope_positions = torch.arange(4), torch.arange(4), torch.ones(3, 4)

    def embed(ids: Any, batch: Any, body: Any, kwargs: Any, *, multimodal_model: Any, use_deepstack: Any) -> Any:
        assert body == "body" and multimodal_model is model and use_deepstack == {"video": True}
        kwargs["input_deepstack_embeds"] = torch.arange(8.0).view(4, 2)
        return torch.zeros(4, 2)

    model: Any = Qwen3VLForConditionalGeneration()
    monkeypatch.setattr(mm_utils, "prepare_mm_inputs", embed)
    monkeypatch.setattr(cp_utils, "cp_shard_hidden_states", lambda x, batch: x[1::2])
    cp_inputs.install(model)
    embeds, positions, kwargs = model.prepare_cp_inputs(Batch())
    assert embeds.shape == (4, 2) and positions is Batch.mrope_positions
    assert kwargs["input_deepstack_embeds"].tolist() == [[2.0, 3.0], [6.0, 7.0]]


def test_no_stream_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.current_stream)  # put back afterwards
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    cpu_current_stream.install()
    stream: object = torch.cuda.current_stream()
    assert stream is None


class Part:
    """What of SGLang's processor and of an item the hooks touch."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def is_video(self) -> bool:
        return self.video  # type: ignore[attr-defined,no-any-return]


class Tower(Part):
    """A vision tower that says what it was given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype=dtype, device=torch.device("cpu"))

    def __call__(self, x: Any, grid_thw: Any) -> Any:
        return x, grid_thw


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pixels_that_travelled_as_uint8_are_the_processors(architecture: str, tmp_path: Path) -> None:
    """Bit for bit, for an image that is resized and a video, in fp32 and rounded to bf16."""
    from transformers import AutoConfig, AutoProcessor

    folder = make_tiny_model(tmp_path / "model", architecture=architecture)
    image = Image.fromarray(next(scene_frames(1, 1, 230, 170, seed=3)))
    video = torch.stack([torch.from_numpy(f).permute(2, 0, 1) for f in scene_frames(6, 6, 224, 168, seed=4)])
    plain, packed = AutoProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    sglangs = Part(mm_feature_transport="cpu")
    server = Part(attention_backend="mm_sparse")
    uint8_pixels._init(lambda *a, **k: None, sglangs, AutoConfig.from_pretrained(folder), server, packed)
    for kind, video_norm in (("pixel_values", False), ("pixel_values_videos", True)):
        want, got = (
            p.video_processor([video], return_tensors="pt")[kind] if video_norm else
            p.image_processor([image], return_tensors="pt")[kind] for p in (plain, packed)
        )  # fmt: skip
        assert got.dtype == torch.uint8 and want.dtype == torch.float32 and got.shape == want.shape
        item: Any = Part(feature=got, format=MultimodalInputFormat.NORMAL, model_specific_data={}, video=video_norm)

        async def made(self: Any, item: Part = item) -> Part:
            return Part(mm_items=[item])

        asyncio.run(uint8_pixels._process(made, sglangs))
        for dtype in (torch.float32, torch.bfloat16):
            model = Part(visual=Tower(dtype), use_data_parallel=False)
            item.video_grid_thw = item.image_grid_thw = torch.tensor([[1, 2, 4], [1, 4, 4]])
            seen, grid = uint8_pixels._feature(lambda *given: None, model, [item, item])
            assert torch.equal(seen[:], torch.cat([want, want]).to(dtype)) and len(seen) == 2 * len(want)
            assert torch.equal(seen[3:7], want[3:7].to(dtype)) and torch.equal(seen.to(dtype=dtype), seen[:])
            across = slice(len(want) - 2, len(want) + 3)
            assert torch.equal(seen[across], torch.cat([want[-2:], want[:3]]).to(dtype)) and len(grid) == 4
            other: Any = Part(feature=torch.zeros(2, 3))  # not ours: SGLang's own way for the batch
            seen = uint8_pixels._feature(lambda self, items: [i.feature for i in items], model, [item, other])
            assert torch.equal(seen[0], want.to(dtype)) and seen[1] is other.feature
        assert item.feature is got  # a later chunk encodes it again
        original = Mock()
        uint8_pixels._move(original, [item, other], "device", "function")
        original.assert_called_once_with([other], "device", "function")


def test_pixels_stay_as_they_are_elsewhere() -> None:
    """Another model, another backend, features on a GPU, an item made by the caller; what is no uint8 is refused."""
    norms = Part(mm_feature_transport="cpu", _mm_sglang_norms={"image": ([0.0], [1.0])})
    qwen, other = "Qwen2_5_VLForConditionalGeneration", "Qwen2VLForConditionalGeneration"
    for name, transport, backend in (
        (qwen, "cpu", "fa3"), (qwen, "cuda_ipc", "mm_sparse"), (other, "cpu", "mm_sparse"),
    ):  # fmt: skip
        sglangs = Part(mm_feature_transport=transport)
        config = Part(architectures=[name])
        uint8_pixels._init(lambda *a, **k: None, sglangs, config, Part(attention_backend=backend), None)
        assert not hasattr(sglangs, "_mm_sglang_norms")
    for form, fine in ((MultimodalInputFormat.PROCESSOR_OUTPUT, True), (MultimodalInputFormat.NORMAL, False)):
        item = Part(feature=torch.ones(2, 3), format=form, model_specific_data={}, video=False)

        async def made(self: Any, item: Part = item) -> Part:
            return Part(mm_items=[item])

        if fine:
            asyncio.run(uint8_pixels._process(made, norms))
            assert uint8_pixels._unpacked(item, None) is item and not item.model_specific_data
        else:
            with pytest.raises(ValueError, match="pixels of torch.float32: needs images and videos of uint8"):
                asyncio.run(uint8_pixels._process(made, norms))
