"""What a checkpoint of a training run holds, and how a run takes it back."""

from typing import Any

import torch
from torch import nn

from visionlora.dynamics.stepper import shortlist
from visionlora.errors import ConfigError, NeverTrainedError


class TrainedState:
    """The part of a model and its optimiser that training changes.

    That is every parameter of the optimiser and every persistent buffer whose value differs from
    the one at construction, so a checkpoint of an adapter stays as small as the adapter.

    Raises:
        NeverTrainedError: a trainable tensor is not in the optimiser.
        ConfigError: the optimiser holds a tensor that the model does not have.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = dict(model.named_parameters())
        stray = [name for name, p in named.items() if p.requires_grad and id(p) not in held]
        if stray:
            raise NeverTrainedError(
                f"{len(stray)} trainable tensors are not in the optimizer: {shortlist(stray)}; "
                "give them to it or freeze them"
            )
        unknown = held - {id(p) for p in named.values()}
        if unknown:
            raise ConfigError(
                f"the optimizer holds {len(unknown)} tensors that are no parameters of the model; "
                "register them in it, so that checkpoints can name them"
            )
        self.model = model
        self.optimizer = optimizer
        self.parameters = {name: p for name, p in named.items() if id(p) in held}
        self._first_buffers = {name: b.detach().clone() for name, b in self._buffers().items()}

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Return the persistent buffers of the model."""
        state = self.model.state_dict(keep_vars=True)
        found = dict(self.model.named_buffers())
        return {name: buffer for name, buffer in found.items() if name in state}

    def capture(self) -> dict[str, Any]:
        """Return parameters, changed buffers and optimiser state."""
        changed = {
            name: buffer
            for name, buffer in self._buffers().items()
            if not _equal(buffer, self._first_buffers.get(name))
        }
        return {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "buffers": changed,
            "optimizer": self.optimizer.state_dict(),
        }

    def size(self) -> int:
        """Estimate the bytes of one checkpoint: parameters, and two moments of each."""
        return 3 * sum(p.numel() * p.element_size() for p in self.parameters.values())

    def restore(self, state: dict[str, Any]) -> None:
        """Put captured values back in place.

        Raises:
            ConfigError: the state belongs to another model or optimiser; nothing was changed.
        """
        buffers = self._buffers()
        _check_shapes(state["parameters"], self.parameters, exact=True)
        _check_shapes(state["buffers"], buffers, exact=False)
        groups = [len(group["params"]) for group in self.optimizer.param_groups]
        saved = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
        if groups != saved:
            raise ConfigError(f"the checkpoint has optimizer groups {saved}, this run {groups}")
        with torch.no_grad():
            for name, value in state["parameters"].items():
                self.parameters[name].copy_(value)
            for name, value in state["buffers"].items():
                buffers[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])


def _equal(buffer: torch.Tensor, first: torch.Tensor | None) -> bool:
    if first is None or buffer.shape != first.shape:
        return False
    return torch.equal(buffer, first.to(buffer.device))


def _check_shapes(saved: dict[str, Any], here: dict[str, Any], *, exact: bool) -> None:
    missing = [name for name in here if name not in saved] if exact else []
    unknown = [name for name in saved if name not in here]
    wrong = [name for name in saved if name in here and saved[name].shape != here[name].shape]
    for names, what in (
        (missing, "lacks"),
        (unknown, "has unknown"),
        (wrong, "reshapes"),
    ):
        if names:
            raise ConfigError(f"the checkpoint {what} {shortlist(names)}: it is of another model")
