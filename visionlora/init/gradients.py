r"""The averaged gradient of every adapted weight, without holding all gradients at once.

    g = sum_b n_b dL_b/dW / sum_b n_b,   n_b: samples of batch b,  L_b: its mean loss

A hook on each weight fires as soon as its gradient is complete, adds it to a sum on the CPU and
drops it, so that at any moment the gradients of one layer at most are alive. A row slice (one
projection of a fused layer) takes its rows. A weight that several layers share gets the gradient of
all its uses, as autograd has it: that of one use alone is not defined by the weight.

Under gradient checkpointing a weight may receive its gradient in parts; the sum is the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from visionlora.errors import ConfigError, DataError, NeverTrainedError
from visionlora.hosts.base import is_quantised, parameter_name, stored, view_of
from visionlora.init.sketch import Total, total_of
from visionlora.ranks.structure import Place


class GradientCapture:
    """Context in which backwards add up the gradients of places instead of keeping them.

    Args:
        places: where adapters are; their frozen weights are looked at.
        sketch: columns of a sketch of every sum, None for the sums themselves.

    Raises:
        ConfigError: a weight is quantised.
    """

    def __init__(self, places: Sequence[Place], sketch: int | None = None) -> None:
        self.weight = 1.0
        """What gradients count until it is changed."""
        self._places: dict[int, list[Place]] = {}
        self._weights: dict[int, Tensor] = {}
        self._totals: dict[str, Total] = {}
        self._reached: set[str] = set()
        self._bad: str | None = None
        self._hooks: list[RemovableHandle] = []
        for place in places:
            weight = stored(place.host, parameter_name(place.host, place.key))
            if is_quantised(weight):
                raise ConfigError(
                    f"the weight of {place.name} is quantised "
                    f"({str(weight.dtype).removeprefix('torch.')}), so it has no gradient; "
                    "estimate gradients on the unquantised model"
                )
            self._weights[id(weight)] = weight
            self._places.setdefault(id(weight), []).append(place)
            wide = torch.promote_types(weight.dtype, torch.float32)
            self._totals[place.name] = total_of(place.site, place.name, sketch, wide)

    @property
    def weights(self) -> list[Tensor]:
        """The weights whose gradients are captured, each once."""
        return list(self._weights.values())

    def __enter__(self) -> "GradientCapture":
        self._hooks = [
            weight.register_post_accumulate_grad_hook(self._take) for weight in self.weights
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _take(self, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        wide = torch.promote_types(dense.dtype, torch.float32)
        dense = dense.detach().to("cpu", wide)
        for place in self._places[id(weight)]:
            part = view_of(dense, place.site)
            if self._bad is None and not bool(torch.isfinite(part).all()):
                self._bad = place.name
            self._totals[place.name].add(part, self.weight)
            self._reached.add(place.name)

    def check(self, batch: int) -> None:
        """Refuse what the last backward brought, if it is not finite.

        Raises:
            DataError: naming the layer and the batch.
        """
        if self._bad is not None:
            raise DataError(
                f"the gradient of {self._bad} holds NaN or infinity in estimation batch {batch}"
            )

    def check_reached(self) -> None:
        """Refuse weights that no backward reached.

        Raises:
            NeverTrainedError: naming the first of them.
        """
        missed = [name for name in self._totals if name not in self._reached]
        if missed:
            more = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
            raise NeverTrainedError(
                f"the loss does not reach the weight of {missed[0]}{more}: no gradient came back"
            )

    def tensors(self) -> list[Tensor]:
        """Return what has to be added up over processes, to be changed in place."""
        return [tensor for total in self._totals.values() for tensor in total.tensors()]

    def means(self, samples: float) -> dict[str, Tensor]:
        """Return the averaged gradient `(out, in)` of every place by name.

        Args:
            samples: the sum of the weights.

        Raises:
            ConfigError: a gradient is exactly zero.
        """
        zero = [
            name
            for name, total in self._totals.items()
            if not any(bool(part.any()) for part in total.tensors())
        ]
        if zero:
            more = f" (and {len(zero) - 1} more)" if len(zero) > 1 else ""
            raise ConfigError(
                f"the gradient of {zero[0]}{more} is exactly zero: a zero-initialised head, or a "
                "zero-initialised end of a residual block, passes nothing back; give it random "
                "weights, or train it alone for a few steps first, or exclude the layers behind it"
            )
        return {name: total.result().div_(samples) for name, total in self._totals.items()}
