"""What a method is: a `Delta` per site, and sometimes a `Shared` per model.

A Delta holds only its own trainables and defines the change of the weight once, densely and
differentiably, as `delta(weight)`. Everything else is an optional faster way to the same numbers,
and is tested against that definition:

* `factors()`: the change as `scale * up @ down`; hosts then never form it.
* `fold = n`: the change has n equal column blocks, `scale * up @ [down ... down]`, so a host may
  add the n input slices first and multiply once.
* `rotate(x)`: the change as a transformation of the input, `(W + delta(W)) x = W rotate(x)`.
* `update(y, x, layer)`: for paths that are none of these, such as DoRA's rescaled output.

A routed method depends on the input: it has only `update`, sets `mergeable = False`, and cannot be
merged, read as a weight, or exported.

A Delta knows nothing of devices, dtypes, quantisation, merging or files: hosts and io own those.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig
from visionlora.errors import AdapterStateError
from visionlora.ops import Frozen, scale_gradient
from visionlora.sites import Kind, Site


@runtime_checkable
class Layer(Protocol):
    """The operators of one adapted layer, as `update` sees them (linear, conv or embedding)."""

    weight: Tensor
    """The site's frozen weight as a 2-D view `(out, in)`."""
    kind: Kind
    """Which layer this is."""
    channels: int
    """Dimension of the features in the output and in the result of `down`."""

    def down(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Apply `(r, in)` to the layer's input; the result has the layer's spatial shape."""

    def up(self, h: Tensor, matrix: Tensor) -> Tensor:
        """Apply `(out, r)` to the result of `down`."""

    def per_output(self, vector: Tensor) -> Tensor:
        """Reshape an `(out,)` vector so that it broadcasts over the layer's output."""

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Drop input entries while training; the identity otherwise."""


class Group(NamedTuple):
    """How one parameter is optimised, relative to the learning rate of the run."""

    lr: float = 1.0
    """Multiplier of the learning rate."""
    decay: bool = True
    """Whether weight decay applies."""


class Shared(nn.Module):
    """Model-level state of one adapter, built from all its sites before any Delta."""

    depends_on_all_sites: ClassVar[bool] = False
    """The numbers of a site depend on which other sites there are."""
    groups: ClassVar[Mapping[str, Group]] = {}
    """How its parameters are optimised, by name; what is missing follows the run."""
    carried: bool = False
    """Files and checkpoints hold its frozen tensors, because they cannot be drawn again."""

    def __init__(self, config: Any, sites: list[Site]) -> None:
        super().__init__()

    def frozen(self) -> dict[str, Tensor]:
        """Seeded tensors that files fingerprint instead of storing."""
        return {}

    def penalty(self) -> Tensor | None:
        """Return a term that is added to the training loss, or None."""
        return None

    @staticmethod
    def parameter_count(config: Any, sites: list[Site]) -> int:
        """Return the number of trained scalars in closed form."""
        return 0


class RowGain(Protocol):
    """Multiplies the gradients of a factor pair per output, while the forward stays as it is."""

    @property
    def to_input(self) -> bool:
        """Whether the gradient of the layer's input has the factor too."""

    def __call__(
        self, up: Float[Tensor, "out rank"], down: Float[Tensor, "rank folded"], fold: int
    ) -> Float[Tensor, " out"]:
        """Return the factors for the change `up @ [down ... down]`, as constants."""


class Delta(nn.Module):
    """The change of one site's weight."""

    zero_at_init: ClassVar[bool] = True
    """The adapted layer equals the frozen one before training."""
    mergeable: ClassVar[bool] = True
    """The change is a matrix; False for routed methods, whose change depends on the input."""
    stochastic: ClassVar[bool] = False
    """`factors` draws noise while training, as dropout does."""
    seeded: ClassVar[bool] = True
    """The initial values depend on the seed."""
    groups: ClassVar[Mapping[str, Group]] = {}
    """How its parameters are optimised, by name; what is missing follows the run."""
    carried: bool = False
    """Files and checkpoints hold its frozen tensors, because they cannot be drawn again."""
    frozen_factor: Frozen = ""
    """Which of `(up, down)` never trains: an expensive pair then takes a cheaper path."""
    fold: int = 1
    """Number of equal column blocks of `scale * up @ down`."""
    row_gain: RowGain | None = None
    """Set by a training dynamics, for the duration of a step, on Deltas with `factors`."""

    def __init__(self, config: Any, site: Site, shared: Shared | None = None) -> None:
        super().__init__()
        self.config: AdapterConfig = config
        # A tuple, so that shared tensors are registered once at the root and not under every site.
        self._shared: tuple[Shared, ...] = () if shared is None else (shared,)

    @property
    def shared(self) -> tuple[Shared, ...]:
        """The model-level state, if the method has one."""
        return self._shared

    @property
    def scale(self) -> float:
        """The constant s in front of the factor pair; 1 for methods without one."""
        return float(getattr(self.config, "scale", 1.0))

    @property
    def dropout(self) -> float:
        """Input dropout probability of the adapter branch."""
        return float(getattr(self.config, "dropout", 0.0))

    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Set the initial values from the frozen weight and a seeded CPU generator."""
        raise NotImplementedError

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank folded"]] | None:
        """Return `(up, down)`, or None if the change has no cheap factor form."""
        return None

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return the change of the weight: the definition of the method.

        Raises:
            AdapterStateError: the method is routed, so its change is no matrix.
        """
        if not self.mergeable:
            raise AdapterStateError(
                f"{self.config.method} routes by input: its change is no matrix"
            )
        factors = self.factors()
        if factors is None:
            raise NotImplementedError(f"{type(self).__name__} must define delta or factors")
        up, down = factors
        change = self.scale * (up @ down.repeat(1, self.fold))
        gain = self.gains(factors)
        return change if gain is None else scale_gradient(change, gain[:, None])

    def gains(self, factors: tuple[Tensor, Tensor]) -> Float[Tensor, " out"] | None:
        """Return what `row_gain` makes of the factors, None without one or without gradients."""
        if self.row_gain is None or not torch.is_grad_enabled():
            return None
        return self.row_gain(*factors, self.fold)

    @property
    def gain_reaches_input(self) -> bool:
        """Whether the gradient of the layer's input has the gains too."""
        return self.row_gain is not None and self.row_gain.to_input

    update: ClassVar[Any] = None
    """Optional method `update(y, x, layer) -> y`: from the layer's output without bias."""
    contract: ClassVar[Any] = None
    """Optional method `contract(weight, x, g, dots, *parameters)`: the gradients of all own
    parameters, in order, from the layer's 2-D input x and output gradient g, without the dense
    gradient `g^T x` (see `visionlora.ops.dense`). Linear layers."""
    contract_uses_output: ClassVar[bool] = False
    """Whether `contract` wants `dots`: `sum_t g * (W + delta(W)) x` per output feature."""
    rotate: ClassVar[Any] = None
    """Optional method `rotate(x) -> x`: linear layers, `(W + delta(W)) x = g * W rotate(x)`."""

    def gain(self) -> Float[Tensor, " out"] | None:
        """Return the factor g of each output beside `rotate`, or None for one."""
        return None

    def bias_change(self) -> Float[Tensor, " out"] | None:
        """Return the change of the layer's bias, or None."""
        return None

    def penalty(self) -> Tensor | None:
        """Return a term that is added to the training loss, or None."""
        return None

    def kept(self) -> Bool[Tensor, " rank"] | None:
        """Return which ranks of `factors` are left when training is over.

        The site then becomes plain LoRA of that rank. None (the default): it stays as it is.
        """
        return None

    def settled(self, build: Callable[[AdapterConfig], "Delta"]) -> "Delta | None":
        """Return what takes this Delta's place when training is over, if it is not plain LoRA.

        Args:
            build: makes a Delta of another configuration for the same site.
        """
        return None

    def frozen(self) -> dict[str, Tensor]:
        """Constant tensors of this site; files fingerprint them, and hold them if `carried`."""
        return {}

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return the number of trained scalars of one site, in closed form."""
        raise NotImplementedError

    @classmethod
    def site_parameter_count(cls, config: Any, site: Site) -> int:
        """Return the count of a site where it depends on more than the size of its view."""
        return cls.parameter_count(config, site.out_features, site.in_features)


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Return float32 values uniform in `[-bound, bound)` from a CPU generator."""
    values = torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever the defaults are
    return values.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def reset_zero_pair(A: Tensor, B: Tensor, kind: Kind, generator: torch.Generator) -> None:
    """Draw LoRA's pair with a zero product: A uniform in +-1/sqrt(in), B = 0.

    On an Embedding the roles swap, as in the reference implementations: A = 0 and B normal, because
    A holds one column per token and B is shared by all of them.
    """
    if kind == "embedding":
        A.zero_()
        B.copy_(torch.empty(B.shape).normal_(generator=generator))
    else:
        A.copy_(uniform(tuple(A.shape), A.shape[1] ** -0.5, generator))
        B.zero_()
