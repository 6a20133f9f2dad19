r"""Second moments and principal components of what adapted layers are given.

    mean = sum x / T,   S = sum (x - mean)(x - mean)^T      x: one input vector, T of them in all
    covariance: S / T + mean mean^T = sum x x^T / T         components: eigenvectors of S

The components are those of the centred inputs, `singular` = sqrt(eigenvalues of S), `ratio` =
eigenvalue over trace. Batches are merged one after another (Chan et al. 1979), so this is PCA in
one pass whose result depends neither on the order of the batches nor on how they are spread over
processes (derived: the reference truncates to a few components after every batch, which loses
both). Costs in x in numbers per layer and T in^2 multiply-adds, and the components one
eigendecomposition per input at the end, in float64.

One input vector is one position: a token of a Linear, the patch under the kernel at one place of a
Conv2d, in the order of the columns of its weight. Row slices of one layer share their input.
MultiheadAttention reads its weights without calling a layer, so its projections get probes in the
place of adapters: changes that add nothing and see the input. Padded tokens count like others.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visionlora.errors import ConfigError, DataError
from visionlora.hosts import AttentionHost, Host, Mode, Slot
from visionlora.hosts.base import parameter_name, stored
from visionlora.init.base import Components
from visionlora.methods.base import Delta, Layer
from visionlora.ranks.structure import Place


class Moments:
    """Count, mean and scatter of vectors, batch by batch, on the CPU."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros(width, dtype=dtype)
        self.scatter = torch.zeros(width, width, dtype=dtype)

    def add(self, x: Float[Tensor, "positions in"]) -> None:
        """Take in more vectors."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(0)
        centred = x - mean
        scatter = (centred.t() @ centred).to(self.scatter.device, self.scatter.dtype)
        self._merge(float(len(x)), mean.to(self.mean.device, self.mean.dtype), scatter)

    def _merge(self, count: float, mean: Tensor, scatter: Tensor) -> None:
        total = float(self.count) + count
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(shift, shift, alpha=float(self.count) * count / total)
        self.mean.add_(shift, alpha=count / total)
        self.count += count

    def add_up(self, summed: Callable[[list[Tensor]], None]) -> None:
        """Take in the vectors of all processes.

        Args:
            summed: replaces tensors, in place, by their sums over processes.
        """
        own, count = self.mean.clone(), float(self.count)
        self.mean *= count
        summed([self.count, self.mean])
        if float(self.count):
            self.mean /= float(self.count)
            shift = own - self.mean
            self.scatter.addr_(shift, shift, alpha=count)
        summed([self.scatter])

    def covariance(self) -> Float[Tensor, "in in"]:
        """Return the mean of `x x^T`."""
        return (self.scatter / float(self.count)).addr_(self.mean, self.mean)

    def components(self, count: int) -> Components:
        """Return the strongest components; the largest entry of each is positive."""
        values, vectors = torch.linalg.eigh(self.scatter.double())
        values = values.clamp_min(0.0).flip(0)[:count]
        vectors = vectors.flip(1)[:, :count].t()
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
        trace = float(self.scatter.double().trace())
        ratio = values / trace if trace > 0 else torch.zeros_like(values)
        kind = self.scatter.dtype
        return Components(vectors.to(kind), values.sqrt().to(kind), ratio.to(kind))


class InputWatch:
    """Context in which the inputs of the layers of places are taken in.

    Args:
        places: where adapters are; no adapter applies meanwhile.

    Raises:
        ConfigError: a layer whose input is no vector per position (embeddings, norms), a grouped
            convolution, or a layer with a forward of its own.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.looking = True
        """False while inputs do not count: a checkpointed layer is called again in a backward."""
        self._moments: dict[str, Moments] = {}
        self._shared: dict[tuple[str, str], Moments] = {}
        self._layers: dict[str, list[Place]] = {}
        self._undo: list[Callable[[], Any]] = []
        for place in places:
            _check_layer(place)
            weight = stored(place.host, parameter_name(place.host, place.key))
            wide = torch.promote_types(weight.dtype, torch.float32)
            own = place.key if isinstance(place.host, AttentionHost) else ""
            key = (place.path, own)
            if key not in self._shared:
                self._shared[key] = Moments(place.site.in_features, wide)
            self._moments[place.name] = self._shared[key]
            self._layers.setdefault(place.path, []).append(place)

    def __enter__(self) -> "InputWatch":
        for places in self._layers.values():
            host = places[0].host
            if isinstance(host, AttentionHost):
                self._undo.append(_probe(host, places, self._take))
            else:
                self._undo.append(self._hook(places[0]).remove)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _hook(self, place: Place) -> RemovableHandle:
        module = cast(nn.Module, place.host)

        def look(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(options.values()))
            self._take(place, _patches(module, x) if isinstance(module, nn.Conv2d) else x)

        return module.register_forward_pre_hook(look, with_kwargs=True)

    def _take(self, place: Place, x: Tensor) -> None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            flat = x.detach().reshape(-1, x.shape[-1])
            if not self.looking or not len(flat):
                return
            if not bool(torch.isfinite(flat).all()):
                raise DataError(f"the input of {place.name} holds NaN or infinity")
            self._moments[place.name].add(flat)

    def moments(self) -> list[Moments]:
        """Return the moments, those of a shared input once."""
        return list(self._shared.values())

    def ranked(self) -> list[tuple[Moments, int]]:
        """Return the moments, each with the largest rank of the sites that share them."""
        largest: dict[int, int] = {}
        for place in (place for places in self._layers.values() for place in places):
            own = id(self._moments[place.name])
            rank = min(rank_of(place), place.site.max_rank)
            largest[own] = max(largest.get(own, 0), rank)
        return [(moments, largest[id(moments)]) for moments in self.moments()]

    def by_place(self) -> dict[str, Moments]:
        """Return the moments of every place by name.

        Raises:
            ConfigError: a layer was never called.
        """
        for name, moments in self._moments.items():
            if not float(moments.count):
                raise ConfigError(
                    f"the layer of {name} was never called, so it has no input to look at (its "
                    "weight is read by other code, or the loss does not need it); exclude it"
                )
        return self._moments


def rank_of(place: Place) -> int:
    """Return the rank of a place's method, 1 for methods without one."""
    return int(getattr(place.delta.config, "rank", None) or 1)


class _Probe(Delta):
    """A change of nothing that passes on the input it sees."""

    def __init__(self, place: Place, seen: Callable[[Place, Tensor], None]) -> None:
        super().__init__(None, place.site)
        self.place, self.seen = place, seen

    def update(self, y: Tensor, x: Tensor, layer: Layer) -> Tensor:
        """Return the output as it is."""
        self.seen(self.place, x)
        return y


def _probe(
    host: AttentionHost, places: Sequence[Place], seen: Callable[[Place, Tensor], None]
) -> Callable[[], None]:
    """Put probes into an attention layer and return what takes them out."""
    mode: Mode = host.state.mode
    host.state.mode = "auto"  # in dense mode changes would not see the input
    host._slots = tuple(Slot(p.key, p.site.rows, _Probe(p, seen), 1.0) for p in places)

    def undo() -> None:
        host.state.mode = mode
        host.refresh()

    return undo


def _patches(conv: nn.Conv2d, x: Tensor) -> Float[Tensor, "batch positions in"]:
    """Return what lies under the kernel at every place of the output."""
    x = x if x.dim() == 4 else x[None]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    kernel, stride = cast(Any, conv.kernel_size), cast(Any, conv.stride)
    return F.unfold(x, kernel, cast(Any, conv.dilation), 0, stride).transpose(1, 2)


def _check_layer(place: Place) -> None:
    host = cast(nn.Module, place.host)
    if place.site.kind not in ("linear", "conv"):
        raise ConfigError(
            f"{place.name} is a site of kind {place.site.kind}, which has no input vectors; "
            "exclude it (Linear, Conv2d and MultiheadAttention have)"
        )
    if place.site.groups != 1:
        raise ConfigError(
            f"{place.name} is a grouped convolution: its groups see different inputs, which have "
            "no common covariance; exclude it"
        )
    plain = cast(Host, host).plain_class
    base = next(k for k in (nn.MultiheadAttention, nn.Conv2d, nn.Linear) if issubclass(plain, k))
    if plain.forward is not base.forward:
        raise ConfigError(
            f"{place.name} is a {plain.__name__}, whose own forward may change its input before "
            "the weight sees it; exclude it"
        )
