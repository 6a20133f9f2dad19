"""Which host a layer gets, and the site it offers: decided before anything is changed.

A layer is hosted by its own fast forward if it is called the ordinary way. It is hosted in dense
mode if its class has a forward of its own, or if the source of a module around it reads
`<layer>.weight` directly, because such a reader would bypass the adapter and it would never train.
"""

import dis
import functools
import inspect
import types
from collections.abc import Hashable, Iterator
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from visionlora.errors import TargetError
from visionlora.hosts.attention import AttentionHost
from visionlora.hosts.base import Host, Mode, is_quantised
from visionlora.hosts.conv import ConvHost
from visionlora.hosts.dense import DenseHost
from visionlora.hosts.embedding import EmbeddingHost
from visionlora.hosts.linear import LinearHost
from visionlora.sites import Kind, Site
from visionlora.targets import LAYERS, row_range

# The class whose forward each host replaces.
_HOSTS: dict[type[nn.Module], tuple[type[Host], Kind]] = {
    nn.Linear: (LinearHost, "linear"),
    nn.Conv2d: (ConvHost, "conv"),
    nn.Embedding: (EmbeddingHost, "embedding"),
    nn.MultiheadAttention: (AttentionHost, "linear"),
    **dict.fromkeys(LAYERS["norm"], (DenseHost, "norm")),
}
# Reads of `.weight` that do not use its values.
_HARMLESS = frozenset({"dtype", "device", "shape", "size", "requires_grad", "numel", "ndim", "dim"})
_LOADS = frozenset({"LOAD_ATTR", "LOAD_METHOD"})


def choose_host(
    model: nn.Module, name: str, module: nn.Module, mode: Mode
) -> tuple[type[Host], Mode]:
    """Return the host class and mode of a plain layer.

    Raises:
        TargetError: the mode was forced and the layer cannot serve it.
    """
    base = next(kind for kind in _HOSTS if isinstance(module, kind))
    own_forward = type(module).forward is not base.forward
    if base is nn.MultiheadAttention:
        if own_forward:
            raise TargetError(
                f"{name} is a {type(module).__name__}, whose own forward cannot carry an adapter"
            )
        return AttentionHost, mode
    if _HOSTS[base][0] is DenseHost:
        reason = f"a {type(module).__name__} has no factor path"
    else:
        own = f"{type(module).__name__} has its own forward"
        reason = own if own_forward else read_by(model, name)
    if reason and mode == "factored":
        raise TargetError(f"{name} cannot use mode 'factored': {reason}; use 'auto' or 'dense'")
    if reason or mode == "dense":
        return DenseHost, "dense"
    return _HOSTS[base][0], mode


def describe(name: str, module: nn.Module, key: str) -> Site:
    """Return the site `key` of a layer.

    Raises:
        TargetError: the layer's weight is of a form that cannot carry an adapter.
    """
    kind = next(kind for base, (_, kind) in _HOSTS.items() if isinstance(module, base))
    if isinstance(module, nn.MultiheadAttention):
        return _describe_attention(name, module, key)
    weight = cast("Tensor | None", module._parameters.get("weight"))
    least = 1 if kind == "norm" else 2
    if weight is None or is_lazy(weight) or weight.dim() < least or is_quantised(weight):
        raise TargetError(
            f"{name or 'the layer'} ({type(module).__name__}) has no floating-point weight "
            "parameter: quantised, parametrised and lazy layers cannot carry an adapter"
        )
    if not weight.numel():
        raise TargetError(f"{name or 'the layer'} has an empty weight, {tuple(weight.shape)}")
    bias = cast("Tensor | None", module._parameters.get("bias")) is not None
    if kind == "norm":
        return Site(name, key, kind, weight.numel(), 1, bias=bias)
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            layer = name or "the layer"
            raise TargetError(
                f"{layer} renormalises its rows (max_norm), which no adapter supports"
            )
        return Site(name, key, kind, weight.shape[1], weight.shape[0])
    groups = int(module.groups) if isinstance(module, nn.Conv2d) else 1
    columns, kernel = weight[0].numel(), weight[0, 0].numel()
    if key == "weight":
        return Site(name, key, kind, weight.shape[0], columns, None, groups, bias, kernel)
    if groups != 1:
        raise TargetError(
            f"{name} is a grouped convolution, whose rows cannot be sliced, got [{key}]"
        )
    start, stop = row_range(name, weight.shape[0], key)
    rows = (start, stop)
    return Site(name, key, kind, stop - start, columns, rows, bias=bias, kernel=kernel)


def _describe_attention(name: str, module: nn.MultiheadAttention, key: str) -> Site:
    width = module.embed_dim
    bias = module.in_proj_bias is not None  # of all four projections, or of none
    if key == "out":
        return Site(name, key, "linear", width, width, bias=bias)
    if module._qkv_same_embed_dim:
        start = {"q": 0, "k": 1, "v": 2}[key] * width
        return Site(name, key, "linear", width, width, (start, start + width), bias=bias)
    columns = {"q": width, "k": module.kdim, "v": module.vdim}[key]
    return Site(name, key, "linear", width, cast(int, columns), bias=bias)


def read_by(model: nn.Module, name: str) -> str:
    """Return why a layer is bypassed (`Attention.forward reads qkv.weight`), or an empty string.

    Looks at every module around the layer, in the code that its forward can reach, for an
    expression `<...>.leaf.weight` whose value is used. Functions outside those classes are not
    seen; the training loop's check that every trainable tensor receives a gradient stands behind
    this one.
    """
    *path, leaf = name.split(".")
    owner = model
    around = [model]
    for part in path:
        owner = getattr(owner, part)
        around.append(owner)
    for owner in reversed(around):
        method = _weight_reads(cast(Hashable, type(owner))).get(leaf)
        if method:
            return f"{type(owner).__name__}.{method} reads {leaf}.weight"
    return ""


@functools.cache
def _weight_reads(cls: type) -> dict[str, str]:
    """Return `{attribute: method}` for each `<...>.attribute.weight` that forward can reach."""
    waiting = [name for name in dir(cls) if name.startswith(("forward", "encode"))]
    seen: set[str] = set()
    found: dict[str, str] = {}
    while waiting:
        method = waiting.pop()
        if method in seen:
            continue
        seen.add(method)
        for code in _definitions(cls, method):
            for part in _with_nested(code):
                waiting.extend(
                    item for item in part.co_names if item not in seen and hasattr(cls, item)
                )
                if "weight" in part.co_names:
                    for attribute in _reads(part):
                        found.setdefault(attribute, method)
    return found


def _definitions(cls: type, name: str) -> Iterator[types.CodeType]:
    """Yield the code of a method or property, and of those that it reaches through `super()`."""
    for owner in cls.__mro__:
        member = owner.__dict__.get(name)
        if member is None:
            continue
        member = getattr(member, "fget", None) or getattr(member, "__func__", member)
        code = getattr(inspect.unwrap(member) if callable(member) else None, "__code__", None)
        if code is None or "torch/nn/modules" in code.co_filename:
            return
        yield code
        if not any("super" in part.co_names for part in _with_nested(code)):
            return


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)


def _reads(code: types.CodeType) -> Iterator[str]:
    """Yield `a` for each place that loads `.a`, then `.weight`, and uses the value.

    The layer may be kept in a local variable in between (`layer = self.a; layer.weight`).
    """
    steps = [
        (step.opname, step.argval)
        for step in dis.get_instructions(code)
        if step.opname not in ("CACHE", "PRECALL", "EXTENDED_ARG", "NOP")
    ]
    held: dict[str, str | None] = {}  # the attribute that a variable was loaded from
    source: str | None = None  # the attribute that the last step loaded
    for (name, value), following in zip(steps, [*steps[1:], ("", "")], strict=True):
        if name in _LOADS:
            harmless = following[0] in _LOADS and following[1] in _HARMLESS
            if source is not None and value == "weight" and not harmless:
                yield source
            source = str(value)
            continue
        # Newer Pythons store and load two variables in one step.
        variables = value if isinstance(value, tuple) else (value,)
        if name.startswith("STORE_FAST"):
            held[variables[0]] = source
        source = held.get(variables[-1]) if "LOAD_FAST" in name else None
