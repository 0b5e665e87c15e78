"""TokenLayout against an enumeration written out token by token, from SGLang's own classes and from token ids."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs

from mm_sglang.kernels.layout import IMAGE, TEXT, VIDEO, TokenLayout, VisionItem, consume_grids
from mm_sglang.layout import layout_from_processor, layout_from_sglang, require_known_architecture

# A prompt as a list of what each position is: (modality, item, t, y, x).
Token = tuple[int, int, int, int, int]
WORD: Token = (TEXT, -1, -1, -1, -1)


def grid(modality: int, item: int, frames: int, rows: int, cols: int) -> list[Token]:
    return [(modality, item, t, y, x) for t in range(frames) for y in range(rows) for x in range(cols)]


def spans_of(tokens: list[Token], item: int) -> list[tuple[int, int]]:
    """Inclusive (start, end) runs of one item, as SGLang's offsets are."""
    at = [p for p, token in enumerate(tokens) if token[1] == item]
    starts = [p for p in at if p - 1 not in at]
    return [(p, next(e for e in range(p, len(tokens)) if e + 1 not in at)) for p in starts]


def qwen2_5(order: list[str]) -> tuple[list[Token], MultimodalInputs]:
    """One span a video; images and videos in any order among words, SGLang's items grouped images first."""
    tokens: list[Token] = [WORD] * 7
    images, videos = [], []
    for number, what in enumerate(order):
        if what == "image":
            tokens += grid(IMAGE, number, 1, 2 + number, 3)
            images.append((number, [1, 2 * (2 + number), 6]))
        else:
            tokens += grid(VIDEO, number, 4 + number, 3, 5)
            videos.append((number, [4 + number, 6, 10]))
        tokens += [WORD] * (2 + number)
    items = [
        MultimodalDataItem(
            modality=Modality.IMAGE,
            offsets=spans_of(tokens, n),
            model_specific_data={"image_grid_thw": torch.tensor([g])},
        )
        for n, g in images
    ] + [
        MultimodalDataItem(
            modality=Modality.VIDEO,
            offsets=spans_of(tokens, n),
            model_specific_data={"video_grid_thw": torch.tensor([g]), "second_per_grid_ts": torch.tensor([0.5])},
        )
        for n, g in videos
    ]
    return tokens, MultimodalInputs(mm_items=items)


def qwen3() -> tuple[list[Token], MultimodalInputs]:
    """A span a temporal frame with timestamps between, then an image."""
    tokens: list[Token] = [WORD] * 5
    frames = grid(VIDEO, 0, 6, 4, 3)
    for t in range(6):
        tokens += [WORD] * (9 + t % 2) + frames[t * 12 : (t + 1) * 12]  # "<0.5 seconds>": not always as many tokens
    tokens += [WORD] * 3 + grid(IMAGE, 1, 1, 2, 2) + [WORD] * 4
    items = [
        MultimodalDataItem(
            modality=Modality.VIDEO,
            offsets=spans_of(tokens, 0),
            model_specific_data={"video_grid_thw": torch.tensor([[6, 8, 6]])},
        ),
        MultimodalDataItem(
            modality=Modality.IMAGE,
            offsets=spans_of(tokens, 1),
            model_specific_data={"image_grid_thw": torch.tensor([[1, 4, 4]])},
        ),
    ]
    return tokens, MultimodalInputs(mm_items=items)


PROMPTS = {
    "text": ([WORD] * 9, None),
    "image": qwen2_5(["image"]),
    "video": qwen2_5(["video"]),
    "two videos and an image": qwen2_5(["video", "image", "video"]),
    "images around a video": qwen2_5(["image", "video", "image", "image"]),
    "qwen3 video and image": qwen3(),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_every_position_of_every_chunk(name: str) -> None:
    tokens, inputs = PROMPTS[name]
    for length in range(len(tokens) + 1):  # every chunk boundary, inside frames and rows too
        layout = layout_from_sglang(inputs, length, merge=2)
        assert layout.coordinates.shape == (5, length)
        assert [tuple(column) for column in layout.coordinates.T.tolist()] == tokens[:length]


@pytest.mark.parametrize("name", PROMPTS)
def test_token_ids_and_grids_give_the_same_layout(name: str) -> None:
    tokens, inputs = PROMPTS[name]
    ids = torch.tensor([[{TEXT: 1, IMAGE: 12, VIDEO: 13}[token[0]] for token in tokens]])
    output: dict[str, torch.Tensor] = {"input_ids": ids}
    items = [] if inputs is None else inputs.mm_items
    for kind in ("image", "video"):  # a processor lists grids by modality, in prompt order
        grids = [i.model_specific_data[f"{kind}_grid_thw"] for i in items if i.modality.name.lower() == kind]
        output |= {f"{kind}_grid_thw": torch.cat(grids)} if grids else {}
    layout = layout_from_processor(output, image_token_id=12, video_token_id=13, merge=2)
    assert [tuple(column) for column in layout.coordinates.T.tolist()] == tokens


def test_positions_after_the_prompt_are_text_and_times_are_kept() -> None:
    tokens, inputs = PROMPTS["video"]
    layout = layout_from_sglang(inputs, len(tokens) + 20, merge=2)  # a retracted request comes back with its answer
    assert layout.modality[len(tokens) :].tolist() == [TEXT] * 20
    assert layout.items[0].seconds_per_frame == 0.5
    assert layout.frame_starts() == [7 + 15 * t for t in range(4)]
    assert layout.counts() == {"text": 9 + 20, "image": 0, "video": 60}


def test_coordinates_are_computed_once_and_again_when_items_are_added() -> None:
    tokens, inputs = qwen2_5(["video", "image"])
    assert inputs is not None
    first, second = (layout_from_sglang(inputs, length, merge=2) for length in (20, 60))
    assert first.coordinates.data_ptr() == second.coordinates.data_ptr()
    last = inputs.mm_items.pop(0)  # the image, which stands last in the prompt
    without = layout_from_sglang(inputs, len(tokens), merge=2)
    assert without.counts()["image"] == 0
    inputs.mm_items.append(last)
    assert [tuple(c) for c in layout_from_sglang(inputs, len(tokens), merge=2).coordinates.T.tolist()] == tokens


def test_images_without_text_between_share_a_span() -> None:
    first, second = consume_grids(IMAGE, [(1, 4, 4), (1, 2, 6)], [(3, 10)], 2)
    assert (first.spans, second.spans) == (((3, 7),), ((7, 10),))


@pytest.mark.parametrize(
    "grids, spans, message",
    [
        ([(2, 4, 4)], [(0, 7)], "1 tokens short"),
        ([(2, 4, 4)], [(0, 9)], "belong to none"),
        ([(2, 5, 4)], [(0, 8)], "multiples of the merge size 2"),
        ([], [(0, 8)], "8 video tokens at 0"),
    ],
)
def test_grids_that_do_not_fit_their_spans_are_refused(
    grids: list[tuple[int, int, int]], spans: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        consume_grids(VIDEO, grids, spans, 2)


def test_items_that_overlap_are_refused() -> None:
    one = VisionItem(modality=IMAGE, frames=1, rows=2, cols=2, spans=((0, 4),))
    two = VisionItem(modality=IMAGE, frames=1, rows=2, cols=2, spans=((3, 7),))
    with pytest.raises(ValueError, match="overlap"):
        TokenLayout(items=(one, two), length=9)
    with pytest.raises(ValueError, match="ascending"):
        VisionItem(modality=IMAGE, frames=1, rows=2, cols=2, spans=((3, 5), (4, 6)))


def test_items_without_a_grid_are_refused() -> None:
    item = MultimodalDataItem(modality=Modality.IMAGE, offsets=[(0, 3)], precomputed_embeddings=torch.zeros(4, 8))
    with pytest.raises(ValueError, match="image item without image_grid_thw"):
        layout_from_sglang(MultimodalInputs(mm_items=[item]), 9, merge=2)
    sound = MultimodalDataItem(modality=Modality.AUDIO, offsets=[(0, 3)])
    with pytest.raises(ValueError, match="'audio' has no token layout rule"):
        layout_from_sglang(MultimodalInputs(mm_items=[sound]), 9, merge=2)


def test_unknown_architectures_are_refused_naming_the_known() -> None:
    assert require_known_architecture(["Qwen3VLForConditionalGeneration"]) == "Qwen3VLForConditionalGeneration"
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*needs one of.*Qwen2_5_VL"):
        require_known_architecture(["LlamaForCausalLM"])
