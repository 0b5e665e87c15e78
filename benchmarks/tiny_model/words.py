"""Every word that the tasks use, and a byte-level tokenizer in which each of them is one token."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mm_sglang.demo.needles import COLOUR_VALUES, FONT
from mm_sglang.demo.tiny_model import CHAT_TEMPLATE, SPECIAL

if TYPE_CHECKING:
    import torch


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLOURS = tuple(COLOUR_VALUES)
GLYPHS = tuple(FONT)
SHAPES = ("star", "heart", "moon", "cross")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
NAMES = _words(
    "Ada Ben Cara Dan Eva Finn Gina Hugo Ines Jack Kim Leo Mia Noah Olga Paul Quinn Rosa Sam Tara "
    "Uma Vera Will Xenia Yara Zoe Amir Bella Carl Dora Emil Frida Greta Hans Ivan Judy Kurt Lena Max Nora"
)
CODES = _words(
    "amber birch cedar delta ember frost grape hazel ivory jade kayak lemon maple north ocean pearl "
    "quartz river solar tulip umber velvet willow xenon yacht zebra anchor bronze copper daisy"
)
ASKED_BY = (*COLOURS, *SHAPES, *CODES)  # each question has one of these words, by which its answer is looked up
ADJECTIVES = _words("old new small large quiet loud bright dark slow fast warm cold round tall plain wild")
NOUNS = _words(
    "house tree dog bird train road lake stone field boat cloud street horse garden window bridge "
    "market tower village letter table mountain forest island"
)
VERBS = _words("sees follows passes finds leaves likes meets reaches paints keeps hears crosses")
PREPOSITIONS = ("near", "behind", "under", "beside", "above", "beyond")
REST = _words(
    "What does the frame with border show Which number stands at of came first one or Where was ball last How many "
    "frames a Whose The code is system user assistant You are helpful"
)


def turned(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [..., hidden] with their halves exchanged: a place of its own for a second word in the same token."""
    return vectors.roll(vectors.shape[-1] // 2, -1)


def filler(choice: random.Random) -> str:
    """One sentence that says nothing; its tokens are its words and the full stop."""
    a, b, n, m, k = (*choice.choices(ADJECTIVES, k=2), *choice.choices(NOUNS, k=3))
    if choice.random() < 0.5:
        return f"The {a} {n} {choice.choice(VERBS)} the {b} {m}."
    return f"The {n} {choice.choice(PREPOSITIONS)} the {m} {choice.choice(VERBS)} the {a} {k}."


def count(text: str) -> int:
    """Tokens of `text` if it consists of the words above, spaces and full stops."""
    return len(text.replace(".", " .").split())


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """Bytes, and whole words taken before any merge (there are none), with and without the space before them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    groups = (COLOURS, GLYPHS, SHAPES, NAMES, CODES, ADJECTIVES, NOUNS, VERBS, PREPOSITIONS, REST)
    words = {word for group in groups for word in group} | {part for place in PLACES for part in place.split()}
    pieces = [*SPECIAL, *letters, *sorted({f"{space}{word}" for word in words for space in ("", "Ġ")} - set(letters))]
    bpe = Tokenizer(
        models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], ignore_merges=True)
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[3:]),
    )
    made.chat_template = CHAT_TEMPLATE
    return made
