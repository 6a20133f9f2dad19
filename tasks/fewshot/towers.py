"""Which layers of a tower `--params` means, found by the structure of its attention and MLPs.

| word | open_clip's ViT and text | timm |
|---|---|---|
| q k v | slices of a MultiheadAttention | slices of `qkv` or `kv`, layers `q`, `q_proj`, ... |
| out | its output projection | `proj` or `out_proj` beside them |
| mlp | `mlp.c_fc`, `mlp.c_proj` | every Linear and Conv2d inside `mlp` |
| conv | every Conv2d of the tower | every Conv2d |
| linear | every Linear of the tower | every Linear |

Attention that only pools (`attn_pool`) is left alone.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from visionlora.errors import ConfigError

QKV = ("q", "k", "v")
SLICES = (*QKV, "out")
WORDS = (*SLICES, "mlp", "conv", "linear")
OUTPUTS = ("proj", "out_proj")


def checked(params: Sequence[str]) -> list[str]:
    """Return the words of `--params`, with `o` read as `out`.

    Raises:
        ConfigError: no word, or an unknown one.
    """
    words = ["out" if name == "o" else name for name in params]
    if unknown := [name for name in words if name not in WORDS]:
        raise ConfigError(f"unknown --params {unknown[0]!r}; any of {' '.join(WORDS)}")
    if not words:
        raise ConfigError(f"--params needs at least one of {' '.join(WORDS)}")
    return words


def has_resblocks(tower: object) -> bool:
    """Tell whether a tower is made of open_clip's own attention blocks."""
    return hasattr(getattr(tower, "transformer", None), "resblocks")


def resblock_targets(tower: nn.Module, prefix: str, params: Sequence[str]) -> list[str]:
    """Return the patterns of one of open_clip's own towers, at `prefix` in the model."""
    blocks = f"{prefix}transformer.resblocks"
    slices = [name for name in SLICES if name in params]
    patterns = [f"{blocks}.*.attn[{','.join(slices)}]"] if slices else []
    if "mlp" in params:
        patterns += [f"{blocks}.*.mlp.c_fc", f"{blocks}.*.mlp.c_proj"]
    return patterns + _all_layers(tower, prefix, params)


def timm_targets(
    tower: nn.Module, prefix: str, params: Sequence[str], else_use: str = ""
) -> list[str]:
    """Return the patterns of any tower of Linear and Conv2d layers, at `prefix` in the model.

    Args:
        tower: Where to look.
        prefix: What comes before the names of its layers.
        params: Words of `--params`.
        else_use: Another way out, for the message.

    Raises:
        ConfigError: a word for which this tower has no layer.
    """
    found: dict[str, list[str]] = {word: [] for word in params}
    for name, module in tower.named_modules():
        if "pool" in name:
            continue
        for word, layer in (*_attention(module), *_mlp(name, module)):
            if word in found:
                found[word].append(f"{prefix}{name}.{layer}")
    for word in ("conv", "linear"):
        if word in found:
            found[word] = _all_layers(tower, prefix, [word])
    for word, layers in found.items():
        if not layers:
            have = " ".join(available(tower)) or "none of all"
            raise ConfigError(f"--params {word}: this vision tower has only {have}{else_use}")
    return list(dict.fromkeys(layer for layers in found.values() for layer in layers))


def available(tower: nn.Module) -> list[str]:
    """Return the words of `--params` for which a tower has layers."""
    words: set[str] = set()
    for name, module in tower.named_modules():
        if "pool" not in name:
            words |= {word for word, _ in (*_attention(module), *_mlp(name, module))}
    words |= {word for word in ("conv", "linear") if _all_layers(tower, "", [word])}
    return [word for word in WORDS if word in words]


def _attention(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the projections of an attention module: word of `--params`, and child with slice."""
    layers = {name for name, child in module.named_children() if _is_layer(child)}
    output = next((name for name in OUTPUTS if name in layers), None)
    if output is None:
        return
    found: list[tuple[str, str]] = []
    if "qkv" in layers:
        found = [(word, f"qkv[{word}]") for word in QKV]
    elif {"q", "kv"} <= layers:
        found = [("q", "q"), ("k", "kv[k]"), ("v", "kv[v]")]
    else:
        for style in ("{}", "{}_proj"):
            names = [style.format(word) for word in QKV]
            if layers.issuperset(names):
                found = list(zip(QKV, names, strict=True))
    if found:
        yield from (*found, ("out", output))


def _mlp(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the layers of a module that is called `mlp`."""
    if name.rpartition(".")[2] == "mlp":
        yield from (("mlp", layer) for layer, child in module.named_modules() if _is_layer(child))


def _all_layers(tower: nn.Module, prefix: str, params: Sequence[str]) -> list[str]:
    """Return the names of all convolutions and linear layers, if `params` asks for them."""
    kinds = tuple(
        kind for word, kind in (("conv", nn.Conv2d), ("linear", nn.Linear)) if word in params
    )
    return [f"{prefix}{name}" for name, item in tower.named_modules() if isinstance(item, kinds)]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)
