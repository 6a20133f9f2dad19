"""Which parameters belong to which repeated block of a model, found from their names.

| name of the layer | block |
|---|---|
| `blocks.3.attn.qkv`, `visual.trunk.blocks.3.norm1` | `blocks.3`, `visual.trunk.blocks.3` |
| `transformer.resblocks.3.mlp.c_fc` | `transformer.resblocks.3` |
| `stages.1.blocks.2.mlp.fc1`, `layers.1.blocks.2.attn.proj` | the inner one, `stages.1.blocks.2` |
| `blocks.1.0.conv_pw` (stages of blocks in one list) | `blocks.1.0` |
| `encoder.layer.3.output.dense`, `encoder.layers.encoder_layer_3.mlp` | `encoder.layer.3`, ... |
| `layer1.0.conv2` | `layer1.0` |

Several towers (image and text) are one list: what is drawn from it bounds the memory of the whole
model. What is outside of every block (embeddings, the last norm, heads, layers between stages, the
shared tensors of an adapter) belongs to none. A parameter of an adapter is where its layer is.
"""

import re
from collections.abc import Iterable

_INDEX = r"(?:[a-z]+_layer_)?\d+"
# A second index counts only where it is no leaf layer of a Sequential.
_INDICES = rf"(?P<indices>(?:\.{_INDEX})(?:\.{_INDEX}(?=\.))*)(?=\.|$)"
_BLOCKS = re.compile(rf"(?:^|\.)(?:blocks|resblocks){_INDICES}")
# These may hold blocks themselves, or stages of them.
_STAGES = re.compile(rf"(?:^|\.)(?:layers?\d*|stages|h){_INDICES}")


def blocks_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return `{block: names of its parameters}` in order, without what belongs to no block."""
    listed = list(names)
    layers = {name: layer_of(name) for name in listed}
    holders = {
        stage[: found.start("indices")]
        for layer in layers.values()
        if (inner := _BLOCKS.search(layer)) and (found := _STAGES.search(stage := layer))
        if found.start() < inner.start()
    }
    result: dict[str, list[str]] = {}
    for name, layer in layers.items():
        found = _BLOCKS.search(layer)
        if found is None:
            found = _STAGES.search(layer)
            if found is None or layer[: found.start("indices")] in holders:
                continue
        result.setdefault(layer[: found.end()], []).append(name)
    return result


def layer_of(name: str) -> str:
    """Return the dotted name of the layer that a parameter, or an adapter's parameter, is of."""
    layer, inside, _ = name.partition(".adapters.")
    return layer if inside else name.rpartition(".")[0]
