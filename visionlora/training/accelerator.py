"""accelerate as the backend of the Stepper: device, precision, processes and trackers.

Only `visionlora.training` knows accelerate. The model is wrapped for several processes here rather
than by `Accelerator.prepare`, which would leave a patched `forward` on the caller's model.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from visionlora.dynamics.base import trainable
from visionlora.errors import ConfigError
from visionlora.training.rundir import RunDirectory
from visionlora.training.settings import TrainSettings

_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_UNSUPPORTED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA")


class AcceleratorBackend:
    """Implements `visionlora.dynamics.Backend` with an `Accelerator`.

    Use it as a context: on leaving it, trackers are closed and the next run may choose another
    precision or device.

    Raises:
        ConfigError: the device does not exist or cannot run the precision, or the tracker is not
            installed.
    """

    def __init__(self, settings: TrainSettings, run: RunDirectory) -> None:
        device = _requested(settings.device)
        kind = device.type if device is not None else _automatic()
        if settings.precision == "fp16" and kind != "cuda":
            raise ConfigError(f"precision fp16 needs a cuda device, got {kind}; use bf16 or fp32")
        tracker = None if settings.tracker == "none" else settings.tracker
        # Someone else's accelerate state is left alone afterwards; our own is not.
        self._ours = not AcceleratorState._shared_state
        try:
            self.accelerator = Accelerator(
                mixed_precision=_MIXED[settings.precision],
                cpu=kind == "cpu",
                device_placement=False,
                log_with=tracker,
                project_dir=str(run.path),
            )
        except (ValueError, ImportError) as error:
            raise ConfigError(f"accelerate: {' '.join(str(error).split())}") from error
        if tracker is not None and not self.accelerator.log_with:
            raise ConfigError(f"the tracker {tracker} is not installed: pip install {tracker}")
        if self.accelerator.distributed_type.value in _UNSUPPORTED:
            kind = self.accelerator.distributed_type.value
            raise ConfigError(f"{kind} is not supported: launch with plain data parallelism")
        self.device: torch.device = device or self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.processes: int = self.accelerator.num_processes
        self._tracker = settings.tracker
        self.tracks = tracker is not None
        self._unscaled = False

    def __enter__(self) -> "AcceleratorBackend":
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self._ours:
            # A process group outlives the run, so that the next run of the same processes finds it.
            AcceleratorState._reset_state(reset_partial_state=False)
            if self.processes == 1:
                PartialState._reset_state()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move the model to the device and return what is to be called: it, or its DDP wrapper."""
        model.to(self.device)
        if self.processes == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    def place(self, batch: Any) -> Any:
        """Move the tensors of a batch to the device."""
        return send_to_device(batch, self.device)

    def start_tracker(self, step: int) -> None:
        """Open the tracker; lines after `step` of an earlier attempt are purged."""
        if self.tracks:
            options = {"tensorboard": {"purge_step": step}} if step else {}
            self.accelerator.init_trackers(self._tracker, init_kwargs=options)

    def track(self, figures: dict[str, float], step: int) -> None:
        """Send figures to the tracker, if there is one."""
        if self.tracks:
            self.accelerator.log(figures, step=step)

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.accelerator.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set in any process."""
        if self.processes == 1:
            return flag
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum")
        return bool(total > 0)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return a context in which a backward does not average gradients over processes."""
        if isinstance(model, DistributedDataParallel):
            context: AbstractContextManager[Any] = model.no_sync()
            return context
        return nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the mixed-precision context for one forward."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward of one loss, scaled under fp16."""
        # Accelerator.backward would also divide by an accumulation count from its own settings.
        scaler = self.accelerator.scaler
        torch.autograd.backward(loss if scaler is None else scaler.scale(loss))

    def loss_scale(self) -> float:
        """Return the loss scale, 1 without one."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the loss scale."""
        scaler = self.accelerator.scaler
        if scaler is None:
            return
        if not self._unscaled:
            scaler.unscale_(optimizer)
            self._unscaled = True
            return
        # torch allows one unscale_ per step, but a second pass makes new, scaled gradients.
        gradients = [p.grad for p in trainable(optimizer) if p.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / scaler.get_scale())

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply the optimiser and let the loss scale grow."""
        scaler = self.accelerator.scaler
        if scaler is None:
            optimizer.step()
            return
        scaler.step(optimizer)
        scaler.update()
        self._unscaled = False

    def skip(self) -> None:
        """Lower the loss scale."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
            self._unscaled = False

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean of a tensor over all processes."""
        if self.processes == 1:
            return value
        mean: torch.Tensor = self.accelerator.reduce(value, "mean")
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale, if there is one."""
        scaler = self.accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the loss scale."""
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)


def _automatic() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _requested(name: str) -> torch.device | None:
    """Return the device a user named, or None to let accelerate choose."""
    if name == "auto":
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is none of auto, cpu, cuda, cuda:N, mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device {name!r} is none of auto, cpu, cuda, cuda:N, mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there: {torch.cuda.device_count()} GPUs found")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps' is not there")
    # Without an index every process of a launch gets its own GPU from accelerate.
    return device if device.type == "cpu" or device.index is not None else None
