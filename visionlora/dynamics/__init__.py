"""Training dynamics: what happens around one optimiser step, in one fixed order."""

from visionlora.dynamics.backend import Backend, PlainBackend
from visionlora.dynamics.base import Dynamics, StepContext
from visionlora.dynamics.stepper import Stepper, StepReport

__all__ = ["Backend", "Dynamics", "PlainBackend", "StepContext", "StepReport", "Stepper"]
