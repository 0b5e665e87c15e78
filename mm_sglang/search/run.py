"""`mm-sglang search`: for each head the pattern that changes attention's output least, all at one cost.

MMInference's algorithm 4 with its faults mended: candidates cost the same number of tiles on the prompt itself, the
objective is the error of the attention output, several samples count, and an interrupted search goes on where it was.
All is measured as a server runs it, the question's queries dense (`text_tail`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mm_sglang.choice import choose_engine
from mm_sglang.config import TEXT_TAIL, SparseConfig
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import HeadPattern
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.long_video import video_limits
from mm_sglang.model_hash import model_hash
from mm_sglang.search.candidates import FAMILIES, at_density, density_by_head
from mm_sglang.search.capture import Captured, known_config
from mm_sglang.search.exact import Exact
from mm_sglang.search.maps import Bytes, layer_curve, layer_maps, maps_file, shown_heads, write_maps
from mm_sglang.search.scores import Scores, choose, too_dear
from mm_sglang.search.settle import content, settle
from mm_sglang.search.videos import LEAST_TOKENS, content_of, require_length
from mm_sglang.settings_file import write_settings

EVERY = tuple(FAMILIES)
OBJECTIVE = "squared error of the output over its own, mean over prompts"
Prompt = Callable[
    [], tuple[Mapping[str, torch.Tensor], TokenLayout]
]  # made when its turn comes; inputs as Captured.run


def search(
    model: str, videos: Sequence[Path], out: Path, *, target: float, device: str, families: Sequence[str] = EVERY,
    max_video_tokens: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Search on videos, write `out` (YAML that a server loads) and return its content.

    Args:
        target: share of dense attention's tiles; families: names of FAMILIES that may be chosen; max_video_tokens: of
            `mm-sglang serve`, if the server will have it; None: SGLang's own limits.

    Raises:
        ValueError: an unknown architecture or family, a video that is missing or too short, a target that is no share,
            or an interrupted search of something else under the same name; before a model is loaded.
    """
    _check(target, families)
    config = known_config(model)
    side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    limits = {} if max_video_tokens is None else video_limits(max_video_tokens, side)
    named: dict[str, Path] = {}
    for video in videos:
        require_length(video, limits, side)
        name = f"{video.name} {content_of(video)}"  # by content too: two folders may each have a clip.mp4
        if name in named:
            raise ValueError(f"--videos: {video} and {named[name]} are the same: needs each once")
        named[name] = video
    if not named:
        raise ValueError("--videos: needs at least one")
    held = Captured(model, device)
    prompts: dict[str, Prompt] = {name: partial(held.prompt, video, limits) for name, video in named.items()}
    return search_prompts(held, prompts, out, target=target, families=families, limits=limits)


def search_prompts(
    held: Captured, prompts: Mapping[str, Prompt], out: Path, *, target: float, families: Sequence[str] = EVERY,
    fewer: Mapping[Path, Sequence[str]] | None = None, limits: Mapping[str, Any] | None = None, maps: bool = True,
    each_layer: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """The same on prompts of any making, by a name that holds what makes them differ.

    Args:
        held: from `Captured(model, device)`.
        fewer: further files, each chosen from some of `families` by the same scores.
        limits: that the prompts were made with, to be told.
        maps: whether to make those of the report.
        each_layer: called before each; what it raises ends the search, which goes on from there at the next call.

    Raises:
        ValueError: as `search`.
    """
    _check(target, families)
    what = {
        "model_hash": model_hash(held.folder), "videos": list(prompts), "density": target, "families": list(families),
        "text_tail": TEXT_TAIL, "limits": dict(limits or {}), "objective": OBJECTIVE,
    }  # fmt: skip
    scores = Scores(out.with_name(out.name + ".partial"), what)
    engine = choose_engine("auto", held.device)
    _score(held, prompts, scores, target, families, engine, each_layer)
    longest, cells = scores.longest, scores.values["cells"]
    name, make = list(prompts.items())[longest]
    prompt, dear = make(), too_dear(cells, target)
    if dear:
        said = f"at {max(scores.values['tokens'])} tokens {len(dear)} of {len(families)} patterns cost more than"
        tqdm.write(f"{said} {target:.0%} at their least: longer videos, or more --density, leave more to choose from")
    told = {
        **what, "tokens": scores.values["tokens"], "model": Path(held.folder).name, "too_dear": dear,
        "budgets": f"of {name}, the longest, as are all figures; families by the error over all prompts",
    }  # fmt: skip
    allowed = {out: list(families), **(fewer or {})}
    choices = {
        path: choose(
            {layer: {f: entry[f] for f in families if f in some} for layer, entry in cells.items()},
            held.heads, target, longest,
        )
        for path, some in allowed.items()
    }  # fmt: skip
    made = {
        path: content(found, {**told, "families": list(allowed[path])})
        for path, found in settle(held, prompt, choices, target, engine, each_layer).items()
    }
    for path, settings in made.items():
        maps_file(path).unlink(missing_ok=True)  # of an earlier search: they would be shown with this one's figures
        write_settings(path, settings)
    if maps:
        _look_again(held, prompt, out, made[out]["provenance"]["heads"], engine)
    scores.path.unlink()  # last: an interruption before goes on from the scores
    return made[out]


def _score(
    held: Captured, prompts: Mapping[str, Prompt], scores: Scores, target: float, families: Sequence[str], engine: Any,
    each_layer: Callable[[], None],
) -> None:  # fmt: skip
    with tqdm(total=len(prompts) * held.layers, desc="search", unit="layer") as progress:
        for number, (name, make) in enumerate(prompts.items()):
            if all(scores.done(number, layer) for layer in range(held.layers)):
                progress.update(held.layers)
                continue
            inputs, layout = make()
            if layout.length < LEAST_TOKENS:
                raise ValueError(f"{name}: gives {layout.length} tokens: needs at least {LEAST_TOKENS}")
            scores.begin(number, layout.length)

            def look(
                layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, number: int = number,
                layout: TokenLayout = layout,
            ) -> None:  # fmt: skip
                each_layer()
                if not scores.done(number, layer):
                    cells, recipes = layer_scores(q, k, v, scale, layout, target, engine, families)
                    scores.add(number, layer, cells, recipes)
                progress.update()

            held.run(inputs, look)


def _look_again(
    held: Captured, prompt: tuple[Mapping[str, torch.Tensor], TokenLayout], out: Path, told: Mapping[int, Any],
    engine: Any,
) -> None:  # fmt: skip
    """For the report: maps of the heads that it shows, and the curve of all that was chosen."""
    config, curves = SparseConfig.from_yaml(out), []
    maps: dict[tuple[int, int], Bytes] = {}
    inputs, layout = prompt
    shown = shown_heads(told)
    with tqdm(total=held.layers, desc="maps for the report", unit="layer") as progress:

        def look(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
            q, k, v = (x.contiguous() for x in (q, k, v))
            patterns = config.patterns(layer, held.heads)
            assert patterns is not None  # every layer has been searched
            own = [head for number, head in shown if number == layer]
            made = layer_maps(q, k, layout, patterns, scale, engine, own)
            maps.update({(layer, head): one for head, one in zip(own, made, strict=True)})
            curves.append(layer_curve(q, k, v, layout, patterns, scale, engine))
            progress.update()

        held.run(inputs, look)
    write_maps(out, maps, curves, layout)


def _check(target: float, families: Sequence[str]) -> None:
    if not 0 < target < 1:
        raise ValueError(f"--density {target}: needs a share between 0 and 1")
    unknown = [name for name in families if name not in FAMILIES]
    if unknown or not families:
        raise ValueError(f"--families {unknown[0] if unknown else ''!r}: needs some of {EVERY}")


def layer_scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, layout: TokenLayout, target: float, engine: Any,
    families: Sequence[str] = EVERY,
) -> tuple[dict[str, list[list[float]]], dict[str, Any]]:  # fmt: skip
    """Each family at the target density: (squared error over the output's, density) by head, and its recipe."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    heads = q.shape[1]
    exact = Exact(q, k, v, scale, engine.ops())
    norm = exact.norm().clamp(min=1e-30)
    cells: dict[str, list[list[float]]] = {}
    recipes: dict[str, Any] = {}
    for family in families:
        pattern: HeadPattern = at_density(family, target, q, k, layout, scale, engine.ops(), TEXT_TAIL)
        out, _, plan = sparse_prefill(
            q, k, v, layout=layout, patterns=[pattern] * heads, scale=scale, engine=engine, tail=TEXT_TAIL
        )
        error = (exact.error(out) / norm).tolist()
        cells[family] = [list(cell) for cell in zip(error, density_by_head(plan), strict=True)]
        recipes[family] = pattern.to_dict()
    return cells, recipes
