"""Training a part of the parameters at a time: what LISA and Half Fine-Tuning have in common.

A *unit* is what is frozen and thawed together. Frozen means `requires_grad` False and no gradient:
one that is zero would still move the weight by momentum and decay. The optimiser is built over
everything beforehand, because what it does not hold could never train. With `dropped` state the
moments of a unit go when it is frozen, which is where the memory is saved; it then starts again as
a new one. A unit that stays keeps its state, so a draw of everything is ordinary training.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import nn

from visionlora.config import AdapterConfig, Form
from visionlora.dynamics.base import Dynamics, StepContext
from visionlora.dynamics.blocks import blocks_of
from visionlora.dynamics.stepper import shortlist
from visionlora.errors import ConfigError
from visionlora.registry import get_method
from visionlora.sites import named_generator

MASKED: frozenset[Form] = frozenset(get_args(Form)) - {"sparse"}
"""Forms of method of which a part can be frozen for a time."""
WHY = "its entries move to where gradients are, and what is frozen has none"


class Masks(Dynamics):
    """Draws at the beginning, and again after every `every`-th applied step.

    Every process draws the same units: the generator depends on the seed alone.

    Args:
        model: outside of any data-parallel wrapper.
        optimizer: holds every parameter of the units.
        units: names of the parameters of every unit.
        every: applied steps between two draws, or None for one draw.
        dropped: whether the optimiser forgets the state of what is frozen.
        seed: of the draws.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        units: Mapping[str, Sequence[str]],
        *,
        every: int | None,
        dropped: bool,
        seed: int,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.units = units
        self.every, self.dropped = every, dropped
        self.generator = named_generator(seed, self.name)
        self.applied = 0
        """Steps that were applied; skipped ones do not count."""
        self.active: set[str] = set(units)
        """Units that train."""
        self.apply(self.draw())

    def draw(self) -> set[str]:
        """Return the units that train next."""
        raise NotImplementedError

    def apply(self, active: Collection[str]) -> bool:
        """Freeze and thaw, and return whether anything changed."""
        before, self.active = self.active, set(active)
        named = dict(self.model.named_parameters())
        for unit, names in self.units.items():
            for name in names:
                parameter = named[name]
                if unit not in self.active:
                    parameter.grad = None
                    if self.dropped:
                        self.optimizer.state.pop(parameter, None)
                parameter.requires_grad_(unit in self.active)
        return self.active != before

    def on_step_end(self, context: StepContext) -> None:
        """Draw anew if it is time."""
        if context.skipped:
            return
        self.applied += 1
        if self.every is not None and self.applied % self.every == 0:
            context.changed |= self.apply(self.draw())

    def on_run_end(self) -> None:
        """Thaw everything, so that all that was trained is saved."""
        named = dict(self.model.named_parameters())
        for name in (name for names in self.units.values() for name in names):
            named[name].requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        """Return what trains now, and where the draws are."""
        return {
            "active": sorted(self.active),
            "generator": self.generator.get_state(),
            "applied": self.applied,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Freeze and thaw as it was, and continue the draws.

        Raises:
            ConfigError: the run trained other parameters.
        """
        unknown = sorted(set(state["active"]) - set(self.units))
        if unknown:
            raise ConfigError(
                f"{self.name}: the saved run trained {unknown[0]}, which this one cannot; resume "
                "with the same trained parameters"
            )
        self.applied = state["applied"]
        self.generator.set_state(state["generator"])
        self.apply(state["active"])


def refuse_reshaping(who: str, config: AdapterConfig) -> None:
    """Refuse methods whose parameters come and go while training.

    Raises:
        ConfigError: with the reason.
    """
    controller = get_method(config.method).controller
    if controller is not None and controller.reshapes:
        raise ConfigError(
            f"{who} cannot train {config.method}: it replaces, adds or drops parameters while it "
            "trains, which those that are frozen would miss"
        )


def trained_blocks(
    who: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, list[str]]:
    """Return the blocks with the names of their parameters that the optimiser may train.

    Raises:
        ConfigError: there is no block.
    """
    held = {id(item) for group in optimizer.param_groups for item in group["params"]}
    names = [n for n, p in model.named_parameters() if p.requires_grad and id(p) in held]
    blocks = blocks_of(names)
    if not blocks:
        raise ConfigError(
            f"{who}: none of the {len(names)} trained tensors is in a repeated block: "
            f"{shortlist(names)}; blocks are known by names such as blocks.3 or layers.3, and "
            "their parameters train with the method full or freeze_base(train='blocks')"
        )
    return blocks
