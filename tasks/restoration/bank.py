"""Several task adapters on one base network, switched without reading a file again.

    bank = AdapterBank(load_base("tiny"))
    bank.add("denoise", "runs/restoration/denoise")
    bank.add("derain", "runs/restoration/derain")
    bank.activate("derain")                # or bank.deactivate() for the network as it was

An adapter is a change of weights, which the layers add on, and trained values of biases, norms and
free scales, which stand in the network itself. The bank keeps the base's values of all that any
task replaces, and puts them back before another task's are copied in: while none is active the
network is the base, bit for bit, after any sequence of switches.
"""

from pathlib import Path

import torch
from torch import Tensor

import visionlora as vl
from tasks.restoration.networks.files import Base
from tasks.restoration.training.adapter_folder import Card, load_adapter
from visionlora.build import refuse_merged
from visionlora.errors import AdapterStateError, nearest
from visionlora.record import base_parameters, hosts_of, persistent_buffers

Values = dict[str, Tensor]


class AdapterBank:
    """The adapters of a network, which runs as the task that is active, or as the base.

    Args:
        base: the network without any adapter; changed in place, and frozen.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.model = base.model
        self.active: str | None = None
        """The task that the network runs as; None for the base."""
        self.cards: dict[str, Card] = {}
        """What is known of each task's adapter, in the order in which they came."""
        self._replaced: dict[str, Values] = {}
        """What each task has in place of values of the base."""
        self._base: Values = {}
        """The base's values of all that any task replaces."""

    def add(self, name: str, folder: str | Path) -> Card:
        """Read an adapter and return what it is; which task is active does not change.

        Args:
            name: what the task is called from now on.
            folder: the run that trained it.

        Raises:
            AdapterStateError: the name is taken, or the network is merged.
            VisionLoraError: the adapter cannot be read, or is of another base; the network is as
                before then.
        """
        if name in self.cards:
            raise AdapterStateError(f"the bank has an adapter {name!r} already")
        before = self.active
        self.deactivate()
        base = {key: value.clone() for key, value in self._tensors().items()}
        try:
            card = load_adapter(self.base, folder, name)
            now = self._tensors()
            changed = [key for key, value in base.items() if not torch.equal(now[key], value)]
            self._replaced[name] = {key: now[key].clone() for key in changed}
            self._base |= {key: base[key] for key in changed}
            self.cards[name] = card
        finally:
            self._put(base)
            for _, parameter in base_parameters(self.model):
                parameter.requires_grad_(False)  # a trained vector comes as one that trains on
            self._use(None)
            if before is not None:
                self.activate(before)
        return card

    def activate(self, name: str) -> None:
        """Make the network that of a task.

        Raises:
            AdapterStateError: an unknown task, or the network is merged.
        """
        if name not in self.cards:
            raise AdapterStateError(
                f"the bank has no adapter {name!r}{nearest(name, self.cards)}; it has "
                f"{', '.join(self.cards) or 'none'}"
            )
        self.deactivate()
        self._use(name)
        self._put(self._replaced[name])
        self.active = name

    def deactivate(self) -> None:
        """Make the network the base again.

        Raises:
            AdapterStateError: the network is merged.
        """
        refuse_merged(self.model, "switch adapters")
        self._use(None)
        self._put(self._base)
        self.active = None

    def _use(self, name: str | None) -> None:
        """Switch the layers, once some have an adapter."""
        if hosts_of(self.model):
            vl.use(self.model, name)

    def _tensors(self) -> Values:
        """Return the base tensors that are there now."""
        found = {key: value.detach() for key, value in base_parameters(self.model)}
        return found | persistent_buffers(self.model)

    def _put(self, values: Values) -> None:
        now = self._tensors()
        with torch.no_grad():
            for key, value in values.items():
                now[key].copy_(value)
