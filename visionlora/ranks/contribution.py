r"""Ranks by contribution: layers that matter more may change more (CoLoRA).

    c_i     = mean over the weights of layer i of their score            (visionlora.analysis)
    delta_i = clip(alpha (c_i / max_j c_j)^gamma + beta, 0, 1)           share of full freedom
    r_i     = round(delta_i d_i k_i / (d_i + k_i)),  between `least` and min(d_i, k_i)

for a layer whose weight is seen as d_i x k_i. A layer whose factors would hold as many numbers as
its weight is trained as a whole. alpha is found by bisection, so that what is trained comes nearest
to the budget and not over it.

That every layer has a ratio of learnable parameters which follows its contribution, that ranks
follow from it, and the constants alpha and beta are those of Park et al. 2024, arXiv 2408.01099;
gamma, the mean instead of the sum, and the bisection are derived, the paper's rule is not known.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from visionlora.errors import ConfigError
from visionlora.hosts import describe
from visionlora.targets import find_targets

STEPS = 60


@dataclass(frozen=True)
class LayerSize:
    """A layer that can be adapted."""

    name: str
    """Dotted name of the layer."""
    out: int
    """Rows d of its weight."""
    into: int
    """Columns k."""

    @property
    def largest(self) -> int:
        """Largest rank of a change."""
        return min(self.out, self.into)

    @property
    def weights(self) -> int:
        """Entries of the weight."""
        return self.out * self.into

    def dense(self, rank: int) -> bool:
        """Whether factors of this rank hold as many numbers as the weight."""
        return rank * (self.out + self.into) >= self.weights

    def cost(self, rank: int) -> int:
        """Return how many numbers are trained."""
        return self.weights if self.dense(rank) else rank * (self.out + self.into)


@dataclass(frozen=True)
class Allocation:
    """What every layer gets."""

    ranks: Mapping[str, int]
    """By layer; 0 is frozen, and where the layer is `dense` it is trained as a whole."""
    dense: frozenset[str]
    trained: int
    """Numbers in factors and dense changes."""
    alpha: float | None = None
    """None for uniform ranks."""


def layer_sizes(model: nn.Module, targets: str | Sequence[str]) -> list[LayerSize]:
    """Return the layers that patterns name, in the order of the model.

    Raises:
        TargetError: see `visionlora.targets`.
        ConfigError: a pattern with a slice; ranks are of whole weights.
    """
    made = []
    for match in find_targets(model, targets):
        if match.keys != ("weight",):
            raise ConfigError(f"ranks are of whole layers, {match.name} is asked for in parts")
        site = describe(match.name, match.module, "weight")
        made.append(LayerSize(match.name, site.out_features, site.in_features))
    return made


def layer_scores(
    attributions: Mapping[str, Tensor], layers: Sequence[LayerSize]
) -> dict[str, float]:
    """Return the mean score of every layer's weight.

    Raises:
        ConfigError: a layer without attribution.
    """
    scores = {}
    for layer in layers:
        name = f"{layer.name}.weight" if layer.name else "weight"
        if name not in attributions:
            raise ConfigError(f"there is no attribution of {name}")
        scores[layer.name] = float(attributions[name].mean())
    return scores


def allocate(
    layers: Sequence[LayerSize],
    scores: Mapping[str, float],
    budget: int,
    *,
    gamma: float = 0.5,
    beta: float = 0.01,
    least: int = 1,
) -> Allocation:
    """Return ranks that follow the scores and train at most `budget` numbers.

    Where the least ranks are too many already, layers of small score are left frozen.

    Raises:
        ConfigError: a score that is missing, negative or not finite, all scores zero, or a budget
            that holds no change at all.
    """
    relative = _relative(layers, scores)

    def at(alpha: float, lowest: int) -> dict[str, int]:
        ranks = {}
        for layer in layers:
            share = min(1.0, alpha * relative[layer.name] ** gamma + beta)
            wish = round(share * layer.weights / (layer.out + layer.into))
            ranks[layer.name] = layer.largest if share == 1 else _between(wish, lowest, layer)
        return ranks

    lowest = least if _cost(layers, at(0.0, least)) <= budget else 0
    needed = max(_cost(layers, at(0.0, lowest)), min(layer.cost(1) for layer in layers))
    if needed > budget:
        raise ConfigError(
            f"a budget of {budget:,} numbers is too small: at least {needed:,} are needed"
        )
    smallest = min((value for value in relative.values() if value > 0), default=1.0)
    low, high = 0.0, max(1.0, smallest**-gamma)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if _cost(layers, at(middle, lowest)) <= budget:
            low = middle
        else:
            high = middle
    return _allocation(layers, at(low, lowest), low)


def uniform(layers: Sequence[LayerSize], budget: int) -> Allocation:
    """Return the largest equal rank that trains at most `budget` numbers.

    Raises:
        ConfigError: rank 1 is over the budget.
    """

    def at(rank: int) -> dict[str, int]:
        return {layer.name: min(rank, layer.largest) for layer in layers}

    if _cost(layers, at(1)) > budget:
        raise ConfigError(
            f"a budget of {budget:,} numbers is too small: rank 1 needs {_cost(layers, at(1)):,}"
        )
    rank = _last(lambda rank: _cost(layers, at(rank)) <= budget, max(x.largest for x in layers))
    return _allocation(layers, at(rank), None)


def _last(fits: Callable[[int], bool], largest: int) -> int:
    """Return the largest rank that fits; what is trained grows with the rank."""
    rank = 1
    while rank < largest and fits(rank + 1):
        rank += 1
    return rank


def _between(wish: int, lowest: int, layer: LayerSize) -> int:
    return max(min(lowest, layer.largest), min(wish, layer.largest))


def _relative(layers: Sequence[LayerSize], scores: Mapping[str, float]) -> dict[str, float]:
    missing = [layer.name for layer in layers if layer.name not in scores]
    if missing:
        more = f" and {len(missing) - 1} more layers" if len(missing) > 1 else ""
        raise ConfigError(f"there is no score for {missing[0]}{more}")
    for layer in layers:
        if not 0 <= scores[layer.name] < float("inf"):
            raise ConfigError(f"the score of {layer.name} is {scores[layer.name]}")
    top = max(scores[layer.name] for layer in layers)
    if top == 0:
        raise ConfigError(
            "all scores are zero: the two models are equal, or the layers do not reach the output "
            "(a fresh NAFNet, whose beta and gamma are zero)"
        )
    return {layer.name: scores[layer.name] / top for layer in layers}


def _cost(layers: Sequence[LayerSize], ranks: Mapping[str, int]) -> int:
    return sum(layer.cost(ranks[layer.name]) for layer in layers if ranks[layer.name])


def _allocation(
    layers: Sequence[LayerSize], ranks: dict[str, int], alpha: float | None
) -> Allocation:
    dense = frozenset(
        layer.name for layer in layers if ranks[layer.name] and layer.dense(ranks[layer.name])
    )
    return Allocation(ranks, dense, _cost(layers, ranks), alpha)
