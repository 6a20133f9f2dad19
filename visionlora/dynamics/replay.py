"""Repeating a forward with the same random draws and untouched running statistics."""

import torch
from torch import nn


class Replay:
    """Context in which the model draws the same random numbers as after `remember()`."""

    def __init__(self, model: nn.Module) -> None:
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._devices = [None, *sorted(devices, key=str)]
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self._start: list[torch.Tensor] = []

    def _states(self) -> list[torch.Tensor]:
        return [
            torch.get_rng_state() if device is None else torch.cuda.get_rng_state(device)
            for device in self._devices
        ]

    def _restore(self, states: list[torch.Tensor]) -> None:
        for device, state in zip(self._devices, states, strict=True):
            if device is None:
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, device)

    def remember(self) -> None:
        """Note the random state that every entry of this context starts from."""
        self._start = self._states()

    def __enter__(self) -> None:
        self._after = self._states()
        self._buffers = [(b, b.clone()) for norm in self._norms for b in norm.buffers()]
        self._restore(self._start)

    def __exit__(self, *_: object) -> None:
        self._restore(self._after)
        for buffer, kept in self._buffers:
            buffer.copy_(kept)
