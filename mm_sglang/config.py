"""SparseConfig: the recipes of all layers and heads, and when to use them. YAML or JSON in, frozen dataclasses out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from mm_sglang.kernels.patterns import HeadPattern, head_pattern

EMPTY: Mapping[Any, Any] = MappingProxyType({})
TEXT_TAIL = 128  # a tile's rows


@dataclass(frozen=True, kw_only=True)
class LayerPatterns:
    """One layer: what its heads run unless `heads` says otherwise."""

    default: HeadPattern
    heads: Mapping[int, HeadPattern] = field(default_factory=lambda: EMPTY)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What the server writes of its sparse prefills, for the demo, tests and reports; off unless given.

    Args:
        dir: existing or new folder; rank r appends one JSON line per request, chunk and layer to `rank<r>.jsonl`.
        tensors: layers whose q, k, v and output are saved there too, a `.pt` file a chunk. Big: for short prompts.
    """

    dir: str
    tensors: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Recall, measured now and then: of `rows` queries of a chunk, all heads, one layer, every `every` batches.

    It costs about half of what a vertical_slash head's estimate does; seen in --enable-metrics. Off unless given.
    """

    every: int = 16
    rows: int = 16

    def __post_init__(self) -> None:
        _require_at_least("probe", self, 1, "every", "rows")


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A head whose recall is under `coverage` gets doubled budgets, at most `grow` times, and then is dense.

    Judged from `rows` queries of a chunk, in every sparse layer, every `every` batches; acts on later chunks, and comes
    down again (guard.py). `dense` false: it never makes a head dense. Off unless given.
    """

    coverage: float
    grow: int = 3
    dense: bool = True
    every: int = 1
    rows: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.coverage, int | float) or isinstance(self.coverage, bool) or not 0 < self.coverage < 1:
            raise ValueError(f"guard: coverage={self.coverage!r}: needs a number between 0 and 1")
        if not isinstance(self.grow, int) or isinstance(self.grow, bool) or not 0 <= self.grow <= 16:
            raise ValueError(f"guard: grow={self.grow!r}: needs a whole number from 0 to 16")
        if not isinstance(self.dense, bool) or not (self.dense or self.grow):
            raise ValueError(f"guard: dense={self.dense!r}: needs true, or false with grow from 1")
        _require_at_least("guard", self, 1, "every", "rows")


def _require_at_least(where: str, entry: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(entry, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{where}: {name}={value!r}: needs a whole number of at least {least}")


@dataclass(frozen=True, kw_only=True)
class AssumedVideo:
    """For benchmarks with dummy weights: prompts without media count as videos of `frames` frames of `rows` x `cols`
    tokens, `text` text tokens after each. Never for real prompts, whose text it would take for video."""

    frames: int = 16
    rows: int = 14
    cols: int = 14
    text: int = 512

    def __post_init__(self) -> None:
        _require_at_least("assume_video", self, 1, "frames", "rows", "cols")
        _require_at_least("assume_video", self, 0, "text")


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Settings of the backend `mm_sparse`.

    Args:
        default: recipe of every head that `layers` does not name.
        layers: layer number -> LayerPatterns.
        dense_layers: layers left to the dense backend whole.
        min_tokens: a chunk with fewer keys than this (prefix + chunk) is left to the dense backend. Default: 4096.
        text_tail: a chunk's last queries, so many at most, attend every key if they are text after all that is shown:
            the question looks things up whatever the heads' recipes left out for the others. 0: none. Default: 128.
        engine: a name of `kernels.engines.ENGINES`, or "auto": by device, logged with its reason.
        trace: see Trace.
        probe: see Probe.
        guard: see Guard.
        assume_video: see AssumedVideo.
        provenance: free notes on where the recipes come from (model, samples, recall); carried, not interpreted.
    """

    default: HeadPattern
    layers: Mapping[int, LayerPatterns] = field(default_factory=lambda: EMPTY)
    dense_layers: tuple[int, ...] = ()
    min_tokens: int = 4096
    text_tail: int = TEXT_TAIL
    engine: str = "auto"
    trace: Trace | None = None
    probe: Probe | None = None
    guard: Guard | None = None
    assume_video: AssumedVideo | None = None
    provenance: Mapping[str, Any] = field(default_factory=lambda: EMPTY)

    def __post_init__(self) -> None:
        if not isinstance(self.min_tokens, int) or isinstance(self.min_tokens, bool) or self.min_tokens < 1:
            raise ValueError(f"min_tokens={self.min_tokens!r}: needs a whole number of at least 1")
        _require_at_least("mm_sparse", self, 0, "text_tail")
        both = sorted(set(self.dense_layers) & set(self.layers))
        if both:
            raise ValueError(f"layer {both[0]} is in dense_layers and in layers: needs one of them")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SparseConfig:
        """From parsed YAML or JSON. Raises ValueError naming the key that is unknown or wrong."""
        known = _only(values, "mm_sparse", *(f.name for f in fields(cls)))
        if "default" not in known:
            raise ValueError("mm_sparse: needs the key 'default', a head pattern")
        made: dict[str, Any] = dict(known)
        made["default"] = head_pattern(known["default"])
        made["layers"] = MappingProxyType(
            {
                _number(number, "layers"): _layer(_number(number, "layers"), entry, made["default"])
                for number, entry in _mapping(known.get("layers"), "layers").items()
            }
        )
        made["dense_layers"] = _numbers(known.get("dense_layers"), "dense_layers")
        made["provenance"] = MappingProxyType(dict(_mapping(known.get("provenance"), "provenance")))
        if known.get("trace") is not None:
            trace = _only(known["trace"], "trace", "dir", "tensors")
            if not isinstance(trace.get("dir"), str):
                raise ValueError(f"trace: dir={trace.get('dir')!r}: needs a folder's path")
            made["trace"] = Trace(dir=trace["dir"], tensors=_numbers(trace.get("tensors"), "trace: tensors"))
        for name, kind in (("probe", Probe), ("guard", Guard), ("assume_video", AssumedVideo)):
            if known.get(name) is not None:
                made[name] = _section(kind, known[name], name)
        return cls(**made)

    @classmethod
    def from_yaml(cls, path: str | Path) -> SparseConfig:
        """From a YAML file. Raises ValueError naming the file when it is missing, unreadable or wrong."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"config {path}: {' '.join(str(error).split())}") from error
        try:
            return cls.from_mapping(_mapping(values, "the file"))
        except ValueError as error:
            raise ValueError(f"config {path}: {error}") from error

    @classmethod
    def from_settings(cls, settings: object) -> SparseConfig:
        """From the value of "mm_sparse" in --json-model-override-args: none, a path, or a mapping."""
        if settings is None:
            return cls.from_yaml(default_config())
        if isinstance(settings, str):
            return cls.from_yaml(settings)
        return cls.from_mapping(_mapping(settings, "mm_sparse"))

    def patterns(self, layer: int, heads: int) -> tuple[HeadPattern, ...] | None:
        """One recipe a query head of `layer`, or None for a layer that is dense as a whole."""
        if layer in self.dense_layers:
            return None
        entry = self.layers.get(layer, LayerPatterns(default=self.default))
        chosen = tuple(entry.heads.get(head, entry.default) for head in range(heads))
        return None if all(pattern.kind == "dense" for pattern in chosen) else chosen

    def check_model(self, *, layers: int, heads: int) -> None:
        """ValueError if a layer or head named here is not in a model of that many, or if no layer would be sparse."""
        traced = self.trace.tensors if self.trace else ()
        for where, numbers in (
            ("layers", self.layers),
            ("dense_layers", self.dense_layers),
            ("trace: tensors", traced),
        ):
            for layer in numbers:
                if layer >= layers:
                    raise ValueError(f"{where}: layer {layer}: the model has layers 0..{layers - 1}")
        for layer, entry in self.layers.items():
            for head in entry.heads:
                if head >= heads:
                    raise ValueError(f"layers: {layer}: heads: head {head}: the model has query heads 0..{heads - 1}")
        if all(self.patterns(layer, heads) is None for layer in range(layers)):
            raise ValueError(f"no sparse layer: all {layers} layers of the model would be dense: needs at least one")


def default_config() -> Path:
    """The YAML file used when no settings are given."""
    return Path(str(resources.files("mm_sglang") / "configs" / "default.yaml"))


def _section(kind: type[Any], value: object, where: str) -> Any:
    given = _only(value, where, *(f.name for f in fields(kind)))
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.name not in given]
    if needed:
        raise ValueError(f"{where}: needs the key {needed[0]!r}")
    return kind(**given)


def _layer(number: int, entry: object, default: HeadPattern) -> LayerPatterns:
    where = f"layers: {number}"
    known = _only(entry, where, "default", "heads")
    try:
        return LayerPatterns(
            default=head_pattern(known["default"]) if "default" in known else default,
            heads=MappingProxyType(
                {
                    _number(head, f"{where}: heads"): head_pattern(recipe)
                    for head, recipe in _mapping(known.get("heads"), f"{where}: heads").items()
                }
            ),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _mapping(value: object, where: str) -> Mapping[Any, Any]:
    if value is None:
        return EMPTY
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: got {type(value).__name__} {value!r}: needs a mapping")
    return value


def _only(value: object, where: str, *known: str) -> Mapping[str, Any]:
    entry = _mapping(value, where)
    unknown = [key for key in entry if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}: needs one of {known}")
    return entry


def _number(value: object, where: str) -> int:
    """A layer or head number; JSON has strings for keys, YAML whole numbers."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{where}: {value!r}: needs a whole number from 0")
    return value


def _numbers(value: object, where: str) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: got {value!r}: needs a list of layer numbers")
    return tuple(_number(entry, where) for entry in value)
