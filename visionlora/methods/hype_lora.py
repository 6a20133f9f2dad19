r"""HypeLoRA: a network generates all factors (Trojan and Gebala 2026, arXiv 2603.19278).

    (A_l, B_l) = H(e_l),   Delta W_l = s * B_l A_l,   B: out x r,  A: r x in,  s = alpha / r

`generator="mlp"`: `depth` hidden GELU layers of `width`, each site on its own. `"transformer"`: a
post-norm encoder in which the sites attend to each other, with one token for A and one for B. On
top there is one output layer per distinct shape of a site. All sites are generated at once, once
per step. `down="fixed"` freezes A, which the paper found to lower the calibration error at some
cost in accuracy (the metrics are in `visionlora.analysis`); `redraw=True` draws it anew in every
training forward.

`blend`: `"replace"` as above; `"add"`: A = (1 - a) A_H + a A_0, B = (1 - a) B_H, where A_0 is the A
that LoRA starts from and a falls linearly from `blend_weight` to 0 over a run of `training.fit`;
`"multiply"`: A = A_H * A_0 entrywise (the product with B_0 = 0 is left out: it would never train).

Initial values (derived): e from N(0, 1); hidden weights uniform, keeping the size of features; the
output layer of A such that its entries are as large as LoRA's; that of B zero, so the change is
zero. In evaluation a redrawn A is the fixed A_0, where the reference code draws on.

The paper's generators are larger than what they emit: MLP width 2048, depth 3, embedding 128 (33.8
million weights for q and v of ViT-B/16), transformer width 256, depth 2, embedding 64 (4.2
million); the defaults here are for vision (0.4 million). A rate of 1/10 of LoRA's suits them; the
paper trains its MLP at 4e-5 and its transformer at 4e-4, with a weight decay of 0.1.

Trained: nothing per site; once the embeddings, hidden layers, and (width + 1) r (out + in) per
shape. Frozen: A_0, drawn again from the seed. Merge: W + Delta W. An export to LoRA is exact, and
needs the network no more. Forwards between two backwards share one graph of the network: add their
losses up, or retain the graph.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import LowRankConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Shared, uniform
from visionlora.methods.parts.cache import GraphCache
from visionlora.methods.parts.hypernet import MLP, Affine, Encoder
from visionlora.methods.parts.routing import full_precision
from visionlora.ranks.blend import BlendSchedule
from visionlora.registry import register
from visionlora.sites import Site, named_generator


@dataclass(frozen=True, kw_only=True)
class HypeLoRAConfig(LowRankConfig):
    """Options of HypeLoRA."""

    method: ClassVar[str] = "hype-lora"

    generator: Literal["mlp", "transformer"] = "mlp"
    """Kind of network."""
    width: int = 32
    """Hidden width of the network."""
    depth: int = 2
    """Number of hidden or encoder layers."""
    embedding: int = 16
    """Size of the learned embedding of a site."""
    down: Literal["generated", "fixed"] = "generated"
    """Whether A is generated or frozen."""
    redraw: bool = False
    """Draw the fixed A anew in every training forward."""
    blend: Literal["replace", "add", "multiply"] = "replace"
    """How generated factors combine with LoRA's initial ones."""
    blend_weight: float = 0.99
    """Share a of the initial factors with blend="add"; where training starts from."""

    def __post_init__(self) -> None:
        """Check types, ranges and combinations."""
        super().__post_init__()
        for option in ("width", "depth", "embedding"):
            value = getattr(self, option)
            if value < 1:
                raise ConfigError(f"hype-lora: {option} must be at least 1, got {value}")
        if not 0.0 <= self.blend_weight <= 1.0:
            raise ConfigError(
                f"hype-lora: blend_weight must lie in [0, 1], got {self.blend_weight}"
            )
        if self.redraw and self.down != "fixed":
            raise ConfigError("hype-lora: redraw=True needs down='fixed', got 'generated'")
        if self.blend == "multiply" and self.down == "fixed":
            raise ConfigError("hype-lora: blend='multiply' needs down='generated', got 'fixed'")

    def meaning(self) -> dict[str, Any]:
        """Leave out what acts in training only."""
        options = super().meaning()
        del options["redraw"]
        if self.blend != "add":
            del options["blend_weight"]
        return options


class HyperNetwork(Shared):
    """The generator of all factors."""

    def __init__(self, config: HypeLoRAConfig, sites: list[Site]) -> None:
        super().__init__(config, sites)
        self.options = config
        # Sorted, because files list sites in the order of the model and users in any order.
        ordered = sorted(sites, key=lambda site: site.name)
        self.index = {site.name: number for number, site in enumerate(ordered)}
        self.shapes = [(site.out_features, site.in_features) for site in ordered]
        tokens = _tokens(config)
        size = (tokens, config.embedding)
        drawn = [torch.empty(size).normal_(generator=self._seeded(s.name)) for s in ordered]
        self.embeddings = nn.Parameter(torch.stack(drawn))
        kind = MLP if config.generator == "mlp" else Encoder
        self.trunk = kind(config.embedding, config.width, config.depth, self._seeded("trunk"))
        self.heads = nn.ModuleDict(
            {_key(shape): self._head(shape) for shape in dict.fromkeys(self.shapes)}
        )
        self.cache = GraphCache()

    def _seeded(self, name: str) -> torch.Generator:
        return named_generator(self.options.seed, f"hype-lora.{name}")

    def _head(self, shape: tuple[int, int]) -> nn.ModuleDict:
        """Return the output layers of one shape: zero for B, as large as LoRA's for A."""
        config, generator = self.options, self._seeded(_key(shape))
        rows, columns = shape
        layers = {"up": Affine(config.width, config.rank * rows, 0.0, generator)}
        if config.down == "generated":
            size = 3.0 if config.blend == "multiply" else 1 / columns
            bound = (size / config.width) ** 0.5
            layers["down"] = Affine(config.width, config.rank * columns, bound, generator)
        return nn.ModuleDict(layers)

    def factors(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return the generated `(B, A)` of a site; A is None if it is not generated."""
        tensors = self.cache.get(self.parameters(), self._generate)
        number, count = self.index[name], len(self.index)
        return tensors[number], tensors[count + number] if len(tensors) > count else None

    def _generate(self) -> list[Tensor]:
        """Return B of every site, then A of every site if it is generated."""
        with torch.autocast(self.embeddings.device.type, enabled=False):
            flat = full_precision(self.embeddings).flatten(0, 1)
            features = self.trunk(flat).unflatten(0, self.embeddings.shape[:2])
            rank = self.options.rank
            ups = self._emit("up", features[:, -1], lambda rows, _: (rows, rank))
            if self.options.down == "fixed":
                return ups
            return ups + self._emit("down", features[:, 0], lambda _, columns: (rank, columns))

    def _emit(self, part: str, features: Tensor, form: Any) -> list[Tensor]:
        """Apply the output layers, each to all sites of its shape at once."""
        found: dict[int, Tensor] = {}
        for shape in dict.fromkeys(self.shapes):
            members = [number for number, other in enumerate(self.shapes) if other == shape]
            layer: Any = self.heads[_key(shape)]
            emitted = layer[part](features[members]).unflatten(-1, form(*shape))
            found.update(zip(members, emitted.to(self.embeddings.dtype).unbind(), strict=True))
        return [found[number] for number in range(len(self.shapes))]

    @staticmethod
    def parameter_count(config: Any, sites: list[Site]) -> int:
        """Return the numbers of embeddings, of the trunk and of all output layers."""
        kind = MLP if config.generator == "mlp" else Encoder
        shapes = {(site.out_features, site.in_features) for site in sites}
        emitted = sum(
            config.rank * (rows + (columns if config.down == "generated" else 0))
            for rows, columns in shapes
        )
        return int(
            len(sites) * _tokens(config) * config.embedding
            + kind.parameter_count(config.embedding, config.width, config.depth)
            + (config.width + 1) * emitted
        )


class HypeLoRA(Delta):
    """A site's share of what the network generates."""

    A: Tensor | None

    def __init__(self, config: HypeLoRAConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.name, self.in_features = site.name, site.in_features
        self.stochastic = config.redraw  # type: ignore[misc]
        start = config.down == "fixed" or config.blend != "replace"
        initial = torch.empty(config.rank, site.in_features) if start else None
        self.register_buffer("A", initial, persistent=False)

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw A_0 as LoRA draws A."""
        if self.A is not None:
            self.A.copy_(uniform(tuple(self.A.shape), self.in_features**-0.5, generator))

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """Return the blended `(B, A)`."""
        config, network = self.config, self._shared[0]
        assert isinstance(config, HypeLoRAConfig)
        assert isinstance(network, HyperNetwork)
        up, down = network.factors(self.name)
        if config.blend == "add":
            up = (1 - config.blend_weight) * up
        if self.A is None:
            assert down is not None
            return up, down
        if down is None:
            return up, self._drawn() if config.redraw and self.training else self.A
        if config.blend == "multiply":
            return up, down * self.A
        return up, (1 - config.blend_weight) * down + config.blend_weight * self.A

    def _drawn(self) -> Tensor:
        """Return a new A of the distribution of A_0."""
        assert self.A is not None
        bound = self.in_features**-0.5
        return torch.empty_like(self.A).uniform_(-bound, bound)

    def frozen(self) -> dict[str, Tensor]:
        """A_0, where there is one."""
        return {} if self.A is None else {"A": self.A}

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return 0: everything that is trained is shared."""
        return 0


def _tokens(config: HypeLoRAConfig) -> int:
    """Return how many embeddings a site has: one for A and one for B if they are apart."""
    return 2 if config.generator == "transformer" and config.down == "generated" else 1


def _key(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


register(HypeLoRAConfig, HypeLoRA, HyperNetwork, BlendSchedule)
