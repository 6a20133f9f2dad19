"""Memory of a training step, found without weights, data or a GPU.

The step is carried out on tensors that have a shape but no values, so that a model of any size is
planned on any machine. Every storage is followed from its creation to its release:

    peak = max over the step of the bytes of all live storages
         = frozen + trained + state + saved + passing

saved are the bytes that the forward keeps for the backward, each storage counted once; passing is
what is alive besides at the worst moment: results on their way, and the gradients there are by
then. What a device adds of its own (context, rounding and fragmentation of its allocator, working
space of kernels) is not in it.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from visionlora.errors import ConfigError

__all__ = ["LiveBytes", "MemoryPlan", "Precision", "plan", "saved_bytes"]

Precision = Literal["fp32", "bf16", "fp16"]
_CAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one training step by what holds them."""

    frozen: int
    """Parameters that do not train, and buffers."""
    trained: int
    """Parameters that train."""
    state: int
    """What the optimiser remembers."""
    gradients: int
    """Gradients of the trained parameters after the backward."""
    saved: int
    """What the forward keeps for the backward."""
    peak: int
    """The most that is alive at one moment of the step."""

    @property
    def passing(self) -> int:
        """What is alive at the peak besides weights, state and saved tensors."""
        return self.peak - self.frozen - self.trained - self.state - self.saved


def plan(
    build: Callable[[], nn.Module],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    precision: Precision = "fp32",
    frozen_dtype: torch.dtype | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = torch.optim.AdamW,
) -> MemoryPlan:
    """Return the memory of one training step after the first.

    Args:
        build: makes the model, adapters included; called with `meta` as the default device, so that
            no weight is ever allocated.
        loss_fn: as for `visionlora.training.fit`.
        batch: tensors, of any device, in tuples, lists and dicts; only their shapes are used.
        precision: that of the forward, by autocast.
        frozen_dtype: the type in which frozen weights are kept, None to leave it as built.
        optimizer: makes the optimiser of the trained parameters.

    Raises:
        ConfigError: nothing trains, or the model or the method decides by values, which there are
            none of.
    """
    with torch.device("meta"):
        model = build()
    with FakeTensorMode():
        _materialise(model, frozen_dtype)
        trained = [item for item in model.parameters() if item.requires_grad]
        if not trained:
            raise ConfigError("plan: the model has no trainable parameter")
        ready = tree_map_only(Tensor, _without_values, batch)
        try:
            return _step(model, lambda: loss_fn(model, ready), optimizer(list(trained)), precision)
        except DataDependentOutputException as error:
            raise ConfigError(
                f"plan: this step depends on values, not only on shapes ({error.func})"
            ) from error


def _materialise(model: nn.Module, frozen_dtype: torch.dtype | None) -> None:
    """Replace every tensor of a model by one without values on the CPU."""
    for module in model.modules():
        for name, item in module._parameters.items():
            if item is not None:
                keep = item.requires_grad or not item.is_floating_point()
                dtype = item.dtype if keep else frozen_dtype or item.dtype
                made = torch.empty(item.shape, dtype=dtype)
                module._parameters[name] = nn.Parameter(made, requires_grad=item.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _without_values(buffer)


def _without_values(item: Tensor) -> Tensor:
    return torch.empty(item.shape, dtype=item.dtype)


def _step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    precision: Precision,
) -> MemoryPlan:
    """Do one step, with the state that an earlier one has left, and count."""
    trained = [item for group in optimizer.param_groups for item in group["params"]]
    everything = [*model.parameters(), *model.buffers()]
    for item in trained:
        item.grad = torch.empty_like(item)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state = [item for own in optimizer.state.values() for item in tree_leaves(own)]
    state = [item for item in state if isinstance(item, Tensor)]
    with LiveBytes([*everything, *state]) as live:
        with (
            torch.autocast("cpu", _CAST.get(precision), enabled=precision in _CAST),
            saved_bytes(everything) as kept,
        ):
            value = loss()
        saved = kept()
        value.backward()
        del value
        gradients = bytes_of(item.grad for item in trained if item.grad is not None)
        optimizer.step()
    return MemoryPlan(
        frozen=bytes_of(everything) - bytes_of(trained),
        trained=bytes_of(trained),
        state=bytes_of(state),
        gradients=gradients,
        saved=saved,
        peak=live.peak,
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes behind some tensors, each storage counted once."""
    storages = [item.untyped_storage() for item in tensors]
    return sum({item._cdata: item.nbytes() for item in storages}.values())


@contextmanager
def saved_bytes(own: Iterable[Tensor]) -> Iterator[Callable[[], int]]:
    """Count what the body keeps for a backward besides `own`.

    Yields a function that returns the bytes; from its call on the graph alone holds the tensors.
    """
    known = {item.untyped_storage()._cdata for item in own}
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            kept.append(tensor)
        return tensor

    def total() -> int:
        found = bytes_of(kept)
        kept.clear()
        return found

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield total


class LiveBytes(TorchDispatchMode):
    """Follow the bytes of live storages while the body runs, with or without values.

    Args:
        present: tensors that exist already and are to be counted.

    Attributes:
        now: bytes alive now.
        peak: the largest value of `now` so far.
    """

    def __init__(self, present: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in present:
            self._follow(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self._follow(item)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        if known is not None and known() is not None:
            return

        def release(gone: Any) -> None:
            self.now -= size
            if self._alive.get(key) is gone:
                del self._alive[key]

        self._alive[key] = weakref.ref(storage, release)
        self.now += size
        self.peak = max(self.peak, self.now)
