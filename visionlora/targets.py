"""Which weights get an adapter: patterns, slices, and refusals.

A pattern is a glob over dotted module names, matched against the full name or any dotted suffix
(`attn.qkv`, `blocks.1?.mlp.fc*`, `visual.*attn`), or a type (`type:Conv2d`). Brackets select
slices of a fused projection: `attn.qkv[q,v]`, `proj[0:768]`, `visual.*attn[q,k,v,out]` on
MultiheadAttention. A list of patterns is a union, `exclude` subtracts layers or slices.

Nothing is silent: every pattern must match a layer that can carry an adapter. A suffix that matches
Linear and convolution layers alike means the Linear ones (so `proj` leaves a patch embedding
alone); name convolutions by full name or by type.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from visionlora.errors import TargetError, nearest
from visionlora.sites import Kind

Layers = tuple[type[nn.Module], ...]
LAYERS: dict[Kind, Layers] = {
    "linear": (nn.Linear, nn.MultiheadAttention),
    "conv": (nn.Conv2d,),
    "embedding": (nn.Embedding,),
    "norm": (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.RMSNorm),
}
"""Types of layer by kind of site."""
WEIGHTS: frozenset[str] = frozenset({"linear", "conv", "embedding"})
"""Kinds that low-rank methods serve."""
ATTENTION_SLICES = ("q", "k", "v", "out")
# Order of the projections inside a fused weight, by the last part of the layer's name.
FUSED_ORDER = {"kv": ("k", "v")}
DEFAULT_ORDER = ("q", "k", "v")

_PATTERN = re.compile(r"^(?P<name>[^\[\]]+)(?:\[(?P<slices>[^\[\]]*)\])?$")


@dataclass(frozen=True)
class Match:
    """A layer and the slice keys selected in it (`("weight",)` for all of it)."""

    name: str
    module: nn.Module
    keys: tuple[str, ...]


def find_targets(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    kinds: frozenset[str] = WEIGHTS,
) -> list[Match]:
    """Resolve target patterns to layers of the given kinds, in module order.

    Raises:
        TargetError: a pattern is malformed, matches nothing, or matches only layers that cannot
            carry an adapter; the message names the nearest module names.
    """
    modules = _own_modules(model)
    supported = tuple(item for kind in LAYERS if kind in kinds for item in LAYERS[kind])
    if isinstance(model, supported):  # the model is itself a layer; its only name is empty
        modules = {"": model, **modules}
    chosen: dict[str, list[str]] = {}
    for pattern in _as_list(targets):
        for name, keys in _resolve(modules, pattern, supported).items():
            known = chosen.setdefault(name, [])
            known.extend(key for key in keys if key not in known)
    for pattern in _as_list(exclude):
        dropped = {name: _excluded(name, modules[name], chosen[name], pattern) for name in chosen}
        if not any(dropped.values()):
            raise TargetError(
                f"exclude pattern {pattern!r} removes none of the {len(chosen)} targets"
                f"{nearest(pattern, chosen)}"
            )
        kept = {name: [key for key in chosen[name] if key not in dropped[name]] for name in chosen}
        chosen = {name: keys for name, keys in kept.items() if keys}
    if not chosen:
        if not _as_list(targets):
            raise TargetError("no target given: name at least one layer")
        raise TargetError(
            f"no target left: exclude={exclude!r} removes all that {targets!r} matches"
        )
    return [Match(name, modules[name], tuple(chosen[name])) for name in modules if name in chosen]


def _own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by name, without those of adapters that it has."""
    from visionlora.record import SharedStates, hosts_of  # it uses the hosts, which use this file

    inner = [f"{path}.adapters" if path else "adapters" for path in hosts_of(model)]
    modules = dict(model.named_modules())
    inner += [name for name, module in modules.items() if isinstance(module, SharedStates)]
    below = tuple(f"{name}." for name in inner)
    kept = modules.keys() - set(inner)
    return {n: m for n, m in modules.items() if n in kept and not n.startswith(below)}


def _excluded(name: str, module: nn.Module, keys: list[str], pattern: str) -> list[str]:
    """Return which of a layer's chosen keys an exclude pattern takes out."""
    glob, slices = _parse(pattern)
    if _matches(name, module, glob):
        return [key for key in keys if not slices or key in slices]
    if isinstance(module, nn.MultiheadAttention) and "out" in keys:
        return ["out"] if _matches(f"{name}.out_proj", module.out_proj, glob) else []
    return []


def row_range(name: str, out_features: int, key: str) -> tuple[int, int]:
    """Return the rows of a slice key in a fused layer with `out_features` rows.

    Raises:
        TargetError: the key is unknown or out of range, or the rows do not divide evenly.
    """
    bounds = re.fullmatch(r"rows_(\d+)_(\d+)", key)
    if bounds:
        start, stop = int(bounds[1]), int(bounds[2])
        if not 0 <= start < stop <= out_features:
            raise TargetError(
                f"slice [{start}:{stop}] of {name} is outside its {out_features} rows"
            )
        return start, stop
    order = FUSED_ORDER.get(name.rsplit(".", 1)[-1], DEFAULT_ORDER)
    if key not in order:
        raise TargetError(
            f"{name} has no slice {key!r}: allowed are {', '.join(order)} or a row range such as "
            f"[0:{out_features}]"
        )
    if out_features % len(order):
        raise TargetError(
            f"{name} has {out_features} rows, which do not divide into {len(order)} equal slices "
            f"({', '.join(order)})"
        )
    size = out_features // len(order)
    return order.index(key) * size, (order.index(key) + 1) * size


def matches_parameter(name: str, pattern: str) -> bool:
    """Whether a pattern names a parameter, a module it belongs to, or a dotted suffix of either."""
    parts = name.split(".")
    owners = (".".join(parts[:stop]) for stop in range(1, len(parts) + 1))
    return any(
        fnmatch.fnmatchcase(suffix, pattern) for owner in owners for suffix in _suffixes(owner)
    )


def _as_list(patterns: str | Sequence[str]) -> list[str]:
    if not isinstance(patterns, Iterable):
        raise TargetError(f"targets must be a pattern or a list of patterns, got {patterns!r}")
    items = [patterns] if isinstance(patterns, str) else list(patterns)
    for item in items:
        if not isinstance(item, str) or not item.strip():
            raise TargetError(f"a target must be a non-empty pattern, got {item!r}")
    return items


def _parse(pattern: str) -> tuple[str, tuple[str, ...]]:
    found = _PATTERN.match(pattern.strip())
    if found is None or found["slices"] == "":
        raise TargetError(
            f"cannot read target {pattern!r}: expected NAME, NAME[q,v] or NAME[0:768]"
        )
    keys = []
    for item in (found["slices"] or "").split(","):
        item = item.strip()
        bounds = re.fullmatch(r"(\d+):(\d+)", item)
        keys.append(f"rows_{bounds[1]}_{bounds[2]}" if bounds else item)
    return found["name"].strip(), tuple(key for key in keys if key)


def _matches(name: str, module: nn.Module, pattern: str) -> bool:
    if pattern.startswith("type:"):
        wanted = pattern.removeprefix("type:")
        return any(kind.__name__ == wanted for kind in type(module).__mro__)
    return any(fnmatch.fnmatchcase(suffix, pattern) for suffix in _suffixes(name))


def _suffixes(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _resolve(
    modules: dict[str, nn.Module], pattern: str, supported: Layers
) -> dict[str, tuple[str, ...]]:
    """Return `{layer name: keys}` of one pattern."""
    glob, keys = _parse(pattern)
    matched = {name: module for name, module in modules.items() if _matches(name, module, glob)}
    usable = {name: module for name, module in matched.items() if isinstance(module, supported)}
    if not usable:
        raise TargetError(_refusal(modules, matched, pattern, glob, supported))
    if not glob.startswith("type:"):
        linear = {name for name, module in usable.items() if not isinstance(module, nn.Conv2d)}
        exact = {name for name in usable if fnmatch.fnmatchcase(name, glob)}
        if linear:
            usable = {name: usable[name] for name in usable if name in linear or name in exact}
        literal = not any(character in glob for character in "*?[")
        foreign = next(
            (
                name
                for name in matched
                if name not in usable
                and not list(matched[name].children())
                and not isinstance(matched[name], supported)
            ),
            None,
        )
        if literal and foreign is not None:
            raise TargetError(
                f"target {pattern!r} matches {foreign}, a {type(modules[foreign]).__name__}, which "
                f"cannot carry an adapter; supported: {_names(supported)}"
            )
    result: dict[str, tuple[str, ...]] = {}
    for name, module in usable.items():
        owner, found = _keys_of(modules, name, module, keys)
        result[owner] = tuple(dict.fromkeys((*result.get(owner, ()), *found)))
    return result


def _keys_of(
    modules: dict[str, nn.Module], name: str, module: nn.Module, keys: tuple[str, ...]
) -> tuple[str, tuple[str, ...]]:
    """Return the layer that hosts `name` and the slice keys in it."""
    parent = name.rpartition(".")[0]
    if name.endswith("out_proj") and isinstance(modules.get(parent), nn.MultiheadAttention):
        # MultiheadAttention reads out_proj.weight and never calls the layer.
        if keys:
            raise TargetError(
                f"{name} is the output of an attention layer and has no slices, got {keys}"
            )
        return parent, ("out",)
    if isinstance(module, nn.MultiheadAttention):
        unknown = [key for key in keys if key not in ATTENTION_SLICES]
        if unknown:
            raise TargetError(
                f"{name} is a MultiheadAttention and has no slice {unknown[0]!r}: allowed are "
                f"{', '.join(ATTENTION_SLICES)}"
            )
        return name, keys or ATTENTION_SLICES
    if keys and isinstance(module, nn.Embedding):
        raise TargetError(f"{name} is an Embedding, which has no slices, got {list(keys)}")
    weight = cast(Tensor, module.weight)
    if keys and isinstance(module, LAYERS["norm"]):
        raise TargetError(f"{name} is a norm, which has no slices, got {list(keys)}")
    for key in keys:
        row_range(name, weight.shape[0], key)
        fused = "kv" in name.rpartition(".")[2].lower() or weight.shape[0] != weight[0].numel()
        if not key.startswith("rows_") and not fused:
            raise TargetError(
                f"{name} maps {weight.shape[0]} features to as many, so it is no fused projection "
                f"with a slice {key!r}; name it without slices, or by a row range"
            )
    return name, keys or ("weight",)


def _names(supported: Layers) -> str:
    return ", ".join(kind.__name__ for kind in supported)


def _refusal(
    modules: dict[str, nn.Module],
    matched: dict[str, nn.Module],
    pattern: str,
    glob: str,
    supported: Layers,
) -> str:
    if matched:
        name, module = next(iter(matched.items()))
        return (
            f"target {pattern!r} matches {name or 'the model'}, a {type(module).__name__}, which "
            f"cannot carry an adapter; supported: {_names(supported)}"
        )
    usable = [name for name, module in modules.items() if isinstance(module, supported)]
    if glob.startswith("type:"):
        kinds = dict.fromkeys(type(modules[name]).__name__ for name in usable)
        here = ", ".join(kinds) or "none"
        return f"no module is of type {glob[5:]!r}; layers here are of type {here}"
    # Near misses: suffixes with as many parts as the pattern has, then any.
    parts = glob.count(".") + 1
    suffixes = dict.fromkeys(".".join(name.split(".")[-parts:]) for name in usable)
    hint = nearest(glob, suffixes) or nearest(glob, usable)
    shown = ", ".join(list(dict.fromkeys(name for name in usable))[:4])
    return f"no module matches target {pattern!r}{hint}; layers start with: {shown or 'none'}"
