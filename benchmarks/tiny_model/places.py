"""What training brings grid heads: python -m benchmarks.tiny_model.places [--steps 600] [--out DIR]

The heads of the model that ships show hardly a grid. Here Qwen2.5-VL's text model, small and with its 3-D rotary
positions, learns from made-up frames of rows x cols tokens in which one token tells a key and its value, and all others
ask for the value of a key that an earlier frame told. Where the telling token stands is all that differs between two
trainings: at one place of all frames of a video ("fixed", as a clock, a caption or a frame's own separator token does),
or anywhere in each ("anywhere", as needles do). Then each head's attention over a longer video is kept by every family
at one density, as the search does it. Runs on a CPU in some ten minutes; writes places.json and places.png.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.common import RESULTS, Parser
from benchmarks.kernels.report import machine
from benchmarks.tiny_model.model import MROPE_SECTION, ROPE_THETA
from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.inspection import density, recall
from mm_sglang.kernels.layout import VIDEO, TokenLayout, consume_grids
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.search.candidates import at_density

KEYS, VALUES, HIDDEN, HEADS, LAYERS = 64, 32, 256, 4, 2
TRAINED, SHOWN = (12, 6, 8), (64, 10, 16)  # frames, rows and columns
BATCH, DENSITY = 4, 0.1
FAMILIES = ("a_shape", "columns", "vertical_slash", "grid frame", "block_topk")
WHERE = ("fixed", "anywhere")


class Reader(nn.Module):
    """Keys and values in, a value's logits out, through the text model as transformers has it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import Qwen2_5_VLTextConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        config = Qwen2_5_VLTextConfig(
            vocab_size=1, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=1 << 16,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": list(MROPE_SECTION)},
        )  # fmt: skip
        self.key, self.value = nn.Embedding(KEYS, HIDDEN), nn.Embedding(VALUES + 1, HIDDEN)
        self.text, self.head = Qwen2_5_VLTextModel(config), nn.Linear(HIDDEN, VALUES)

    def forward(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """keys, values: int64 [B, N], a value of VALUES asks; positions: [3, B, N]."""
        embeds = self.key(keys) + self.value(values)
        out = self.text(inputs_embeds=embeds, position_ids=positions, use_cache=False)
        return self.head(out.last_hidden_state)  # type: ignore[no-any-return]


def video(where: str, shape: tuple[int, int, int], batch: int, source: torch.Generator) -> tuple[torch.Tensor, ...]:
    """keys, values and targets [B, N] (-100: nothing asked) and positions [3, B, N] of videos made up."""
    frames, rows, cols = shape
    cells = rows * cols
    told = torch.stack([torch.randperm(KEYS, generator=source)[:frames] for _ in range(batch)])  # [B, frames]
    answers = torch.randint(VALUES, (batch, frames), generator=source)
    place = torch.randint(cells, (batch, frames), generator=source)
    if where == "fixed":
        place = place[:, :1].expand(-1, frames)
    # every other token asks for what some earlier frame told; in the first frame there is nothing to ask for
    asked = (torch.rand(batch, frames, cells, generator=source) * torch.arange(frames)[:, None]).long()
    keys = told.gather(1, asked.flatten(1)).view(batch, frames, cells)
    targets = answers.gather(1, asked.flatten(1)).view(batch, frames, cells)
    targets[:, 0] = -100
    values = torch.full_like(keys, VALUES)
    at = place[..., None]
    keys.scatter_(2, at, told[..., None])
    values.scatter_(2, at, answers[..., None])
    targets.scatter_(2, at, -100)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(cols)).T  # [3, N]
    return keys.flatten(1), values.flatten(1), targets.flatten(1), grid[:, None].expand(-1, batch, -1)


def train(where: str, steps: int, seed: int) -> tuple[Reader, list[float]]:
    """The trained model, and the share of right answers every 50 steps."""
    torch.manual_seed(seed)
    source, model, curve = torch.Generator().manual_seed(seed), Reader(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in (bar := tqdm(range(steps), desc=where, unit="step")):
        keys, values, targets, positions = video(where, TRAINED, BATCH, source)
        logits = model(keys, values, positions)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            asked = targets >= 0
            curve.append(float((logits.argmax(-1) == targets)[asked].float().mean()))
            bar.set_postfix(right=f"{curve[-1]:.2f}")
    return model, curve


@torch.no_grad()
def looked(model: Reader, where: str, seed: int) -> tuple[float, list[tuple[torch.Tensor, ...]]]:
    """Right answers in a video of SHOWN, and q, k, v [N, H, D] of each layer."""
    from transformers import AttentionInterface

    seen: list[tuple[torch.Tensor, ...]] = []

    def attention(_: Any, query: Any, key: Any, value: Any, __: Any, scaling: float, **___: Any) -> tuple[Any, None]:
        seen.append(tuple(x[0].transpose(0, 1).contiguous() for x in (query, key, value)))
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("mm_places", attention)
    model.text.config._attn_implementation = "mm_places"
    keys, values, targets, positions = video(where, SHOWN, 1, torch.Generator().manual_seed(seed))
    right = model(keys, values, positions).argmax(-1) == targets
    return float(right[targets >= 0].float().mean()), seen


def kept(tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[str, float, list[float]]]:
    """(family, density, recall of each head) of a layer, at most DENSITY of the tiles each."""
    q, k, v = tensors
    frames, rows, cols = SHOWN
    items = tuple(consume_grids(VIDEO, [(frames, 2 * rows, 2 * cols)], [(0, len(q))], 2))
    layout, own, scale = TokenLayout(items=items, length=len(q)), engine("reference"), q.shape[2] ** -0.5
    rows_at = torch.arange(63, len(q), 64, dtype=torch.int32)
    dense = own.ops().row_lse(q, k, None, rows_at, 0, scale)
    for family in FAMILIES:
        pattern = at_density(family, DENSITY, q, k, layout, scale, own.ops())
        _, lse, plan = sparse_prefill(q, k, v, layout=layout, patterns=[pattern] * HEADS, scale=scale, engine=own)
        yield family, density(plan), recall(lse[rows_at.long()].T, dense).tolist()


def attention_map(tensors: tuple[torch.Tensor, ...], head: int) -> torch.Tensor:
    """[query frames, keys of some frames]: what the queries of each frame look at in the mean."""
    q, k, _ = tensors
    cells, most = SHOWN[1] * SHOWN[2], 12
    weights = []
    for frame in range(1, most):
        queries = q[frame * cells : (frame + 1) * cells : 4, head]
        scores = queries @ k[: most * cells, head].T * q.shape[2] ** -0.5
        after = torch.arange(most * cells)[None] > torch.arange(frame * cells, (frame + 1) * cells, 4)[:, None]
        weights.append(scores.masked_fill(after, -torch.inf).softmax(-1).mean(0))
    return torch.stack(weights)


def draw(maps: dict[str, tuple[str, torch.Tensor]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(maps), 1, figsize=(11, 2.6 * len(maps)), layout="constrained")
    cells = SHOWN[1] * SHOWN[2]
    for axis, (where, (title, weights)) in zip(axes, maps.items(), strict=True):
        axis.imshow(weights.clamp(min=1e-3).log10(), aspect="auto", cmap="magma", interpolation="nearest", vmin=-3)
        for frame in range(1, weights.shape[1] // cells):
            axis.axvline(frame * cells - 0.5, color="white", lw=0.3)
        axis.set(title=f"trained on {where}: {title}", ylabel="queries' frame", xlabel="key (lines: frames)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = Parser("benchmarks.tiny_model.places", __doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "places", help="default: %(default)s")
    options = parser.parse_args()
    if options.steps < 50:
        parser.error(f"--steps {options.steps}: needs at least 50")
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"about": machine(), "steps": options.steps, "density": DENSITY, "trained": {}}
    maps = {}
    for where in WHERE:
        model, curve = train(where, options.steps, options.seed)
        right, layers = looked(model, where, options.seed + 1)
        heads: list[dict[str, Any]] = [
            {"layer": layer, "family": family, "density": cost, "recall": shares}
            for layer, tensors in enumerate(layers) for family, cost, shares in kept(tensors)
        ]  # fmt: skip
        found["trained"][where] = {"curve": curve, "right": right, "kept": heads}
        # the head that keys of its own choice hold best, over what the nearest ones hold
        by = {(one["layer"], one["family"]): one["recall"] for one in heads}
        gain = {(layer, head): max(by[layer, "columns"][head], by[layer, "grid frame"][head]) - near
                for layer in range(LAYERS) for head, near in enumerate(by[layer, "a_shape"])}  # fmt: skip
        layer, head = max(gain, key=lambda place: gain[place])
        maps[where] = (f"layer {layer}, head {head}", attention_map(layers[layer], head))
        print(where, f"right {right:.3f}")
        for one in heads:
            print(one["layer"], f"{one['family']:16} {one['density']:.3f}", [round(x, 2) for x in one["recall"]])
    (options.out / "places.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(maps, options.out / "places.png")


if __name__ == "__main__":
    main()
