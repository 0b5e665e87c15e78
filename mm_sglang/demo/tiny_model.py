"""Tiny random-weight models of real architectures, with tokenizer and processor files as the real ones ship them.

SGLang and transformers load them unmodified; they know nothing, but everything a long video goes through is there.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
VOCABULARY = 512
STAMP = "mm_sglang_tiny.json"
ARCHITECTURES = ("qwen2_5_vl", "qwen3_vl")

# As Qwen2.5-VL's own: vision parts become placeholders in the place where they stand.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(
    folder: Path,
    *,
    architecture: str = "qwen2_5_vl",
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 32,
    max_positions: int = 32768,
    seed: int = 0,
) -> Path:
    """Write the model into `folder` unless the same one is there; returns `folder`.

    Args:
        architecture: "qwen2_5_vl" or "qwen3_vl".
        max_positions: context length in tokens.

    Raises:
        ValueError: unknown architecture, sizes that don't fit each other, or a folder with something else in it.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r}: needs one of {ARCHITECTURES}")
    shape = dict(layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, max_positions=max_positions)
    for name, value in shape.items():
        if value < 1:
            raise ValueError(f"{name}={value}: needs at least 1")
    if heads % kv_heads or head_dim % 8:
        raise ValueError(
            f"heads={heads}, kv_heads={kv_heads}, head_dim={head_dim}: needs a multiple of kv_heads and of 8"
        )
    stamp = json.dumps({"architecture": architecture, "seed": seed, "version": 2, **shape})
    if (folder / STAMP).is_file():
        if (folder / STAMP).read_text() == stamp:
            return folder
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder={folder}: holds something that was not made here; needs a new or an empty folder")
    fresh = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        tokenizer = _tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
        _weights(architecture, ids, seed, shape).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        save_processor(architecture, fresh)
        (fresh / STAMP).write_text(stamp)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _tokenizer() -> Any:
    """A byte-level BPE: every text can be written, timestamps too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    bpe.train_from_iterator(["what is in the video? the image shows a man and the time is seconds. " * 20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[3:]),
    )


def _weights(architecture: str, ids: dict[str, int], seed: int, shape: dict[str, int]) -> Any:
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    half = shape["head_dim"] // 2
    side = half * (3 if architecture == "qwen2_5_vl" else 2.5) // 8  # the real 16, 24, 24 and 24, 20, 20 of 64, scaled
    section = [half - 2 * int(side), int(side), int(side)]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    hidden = shape["heads"] * shape["head_dim"]
    text = dict(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"], head_dim=shape["head_dim"],
        max_position_embeddings=shape["max_positions"], rope_parameters=rope, tie_word_embeddings=False,
        eos_token_id=ids["<|im_end|>"], bos_token_id=ids["<|endoftext|>"],
    )  # fmt: skip
    vision: dict[str, Any] = dict(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=4, in_channels=3, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=hidden,
    )  # fmt: skip
    common = dict(
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], tie_word_embeddings=False,
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(seed)
    if architecture == "qwen2_5_vl":
        vision |= dict(patch_size=14, tokens_per_second=2, window_size=112, fullatt_block_indexes=[1])
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **common))
    else:
        rope["mrope_interleaved"] = True
        vision |= dict(patch_size=16, num_position_embeddings=256, deepstack_visual_indexes=[0, 1])
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **common))
    # The usual initialisation leaves attention flat and every logit near zero. Unit-variance maps, with sharper
    # queries and keys, give attention that looks somewhere and answers that depend on what is shown.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "lm_head")) else 1.0
                std = 1.0 if "embed" in name and "patch" not in name else gain * fan_in**-0.5
                parameter.normal_(0.0, std)
    model.config.architectures = [type(model).__name__]
    return model.to(torch.float32)


def save_processor(architecture: str, folder: Path) -> None:
    """The files that the real repositories hold; transformers' own processor.save_pretrained writes one of its v5."""
    from transformers import (
        AutoImageProcessor,  # noqa: F401  (loads the lazily registered image processors)
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLVideoProcessor,
    )

    if architecture == "qwen2_5_vl":
        size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16384 * 28 * 28}
        image: Any = Qwen2VLImageProcessor(patch_size=14, size=size)
        video: Any = Qwen2VLVideoProcessor(patch_size=14, size=size)
        name = "Qwen2_5_VLProcessor"
    else:
        norm = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
        size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 16384 * 32 * 32}
        image = Qwen2VLImageProcessor(patch_size=16, size=size, **norm)
        video = Qwen3VLVideoProcessor(patch_size=16, size=size, **norm)
        name = "Qwen3VLProcessor"
    for part, file in ((image, "preprocessor_config.json"), (video, "video_preprocessor_config.json")):
        settings = json.loads(part.to_json_string()) | {"processor_class": name}
        (folder / file).write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
