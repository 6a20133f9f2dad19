"""What a checkpoint of a training run holds, and how a run takes it back.

Training may replace, add and remove parameters. So names are looked up when a checkpoint is made,
optimiser groups are lists of names, and the structure of the adapters (`visionlora.ranks`) is taken
back first, then values, then groups and their state.
"""

from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from visionlora.dynamics.stepper import shortlist
from visionlora.errors import ConfigError, NeverTrainedError
from visionlora.methods.base import Delta, Shared
from visionlora.ranks.structure import build_config_from, prepare, structure_of


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
        self._first_buffers = {name: b.detach().clone() for name, b in self._buffers().items()}
        self._start = structure_of(model)

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the optimiser holds now."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self.model.named_parameters() if id(p) in held}

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Return the persistent buffers of the model."""
        state = self.model.state_dict(keep_vars=True)
        found = dict(self.model.named_buffers())
        return {name: buffer for name, buffer in found.items() if name in state}

    def capture(self) -> dict[str, Any]:
        """Return structure, parameters, changed buffers and optimiser state."""
        changed = {
            name: buffer
            for name, buffer in self._buffers().items()
            if not _equal(buffer, self._first_buffers.get(name))
        }
        parameters = self._parameters()
        return {
            "start": self._start,
            "structure": structure_of(self.model),
            "parameters": {name: p.detach() for name, p in parameters.items()},
            "buffers": changed,
            "constants": {name: item.detach() for name, item in carried(self.model).items()},
            "optimizer": _capture(self.optimizer, parameters),
        }

    def size(self) -> int:
        """Estimate the bytes of one checkpoint: parameters, and two moments of each."""
        return 3 * sum(p.numel() * p.element_size() for p in self._parameters().values())

    def restore(self, state: dict[str, Any]) -> None:
        """Put captured values back in place.

        Raises:
            ConfigError: the state belongs to another model or optimiser; nothing was changed.
        """
        _check_start(state["start"], self._start)
        renewal = prepare(self.model, state["structure"])
        buffers = self._buffers()
        named = renewal.parameters() if renewal else dict(self.model.named_parameters())
        here = {name: p for name, p in named.items() if p.requires_grad}
        if not renewal:
            here |= self._parameters()
        _check_shapes(state["parameters"], here, exact=True)
        _check_shapes(state["buffers"], buffers, exact=False)
        groups = [group["params"] for group in state["optimizer"]["groups"]]
        if not renewal and groups != _names(self.optimizer, here):
            saved, ours = ([len(x) for x in g] for g in (groups, _names(self.optimizer, here)))
            raise ConfigError(f"the checkpoint has optimizer groups {saved}, this run {ours}")
        if not renewal:
            _check_shapes(state["constants"], carried(self.model), exact=True)
        renewal.apply()
        constants = carried(self.model)
        _check_shapes(state["constants"], constants, exact=True)
        with torch.no_grad():
            for name, value in state["constants"].items():
                constants[name].copy_(value)
            for name, value in state["parameters"].items():
                here[name].copy_(value)
            for name, value in state["buffers"].items():
                buffers[name].copy_(value)
        _restore(self.optimizer, state["optimizer"], here)


def carried(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the constant tensors of adapters that cannot be drawn again, by module and name."""
    return {
        f"{prefix}.{name}": tensor
        for prefix, module in model.named_modules()
        if isinstance(module, Delta | Shared) and module.carried
        for name, tensor in module.frozen().items()
    }


def _check_start(saved: list[Any], here: list[Any]) -> None:
    """Refuse a model whose adapters were not those that the run began with."""
    for one, other in zip_longest(saved, here):
        places = [None if x is None else f"adapter {x[1]!r} at {x[0]}.{x[2]}" for x in (one, other)]
        if places[0] != places[1]:
            raise ConfigError(
                f"the checkpoint has {places[0] or 'nothing'} where this run has "
                f"{places[1] or 'nothing'}: it is of another model"
            )
        there, ours = (build_config_from(x[3]).to_dict() for x in (one, other))
        for key, value in there.items():
            if value != ours.get(key):
                raise ConfigError(
                    f"{places[0]}: {key} was {value!r} and is {ours.get(key)!r}; resume with the "
                    "options that the run began with"
                )


def _names(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> list[Any]:
    """Return the names of the parameters of every group."""
    names = {id(p): name for name, p in parameters.items()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _capture(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, Any]:
    """Return groups and state by name."""
    saved = optimizer.state_dict()
    names = _names(optimizer, parameters)
    indices = [group["params"] for group in saved["param_groups"]]
    pairs = [pair for some in zip(indices, names, strict=True) for pair in zip(*some, strict=True)]
    return {
        "groups": [
            {**group, "params": own}
            for group, own in zip(saved["param_groups"], names, strict=True)
        ],
        "state": {name: saved["state"][i] for i, name in pairs if i in saved["state"]},
    }


def _restore(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], parameters: dict[str, nn.Parameter]
) -> None:
    """Give the optimiser the saved groups over these parameters, and their state."""
    names = [name for group in state["groups"] for name in group["params"]]
    index = {name: i for i, name in enumerate(names)}
    optimizer.state.clear()
    optimizer.param_groups[:] = [
        {**group, "params": [parameters[name] for name in group["params"]]}
        for group in state["groups"]
    ]
    optimizer.load_state_dict(
        {
            "state": {index[name]: value for name, value in state["state"].items()},
            "param_groups": [
                {**group, "params": [index[name] for name in group["params"]]}
                for group in state["groups"]
            ],
        }
    )


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
