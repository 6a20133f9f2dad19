"""Generated factors that take over from initial ones in the course of a run."""

from dataclasses import replace
from typing import Any

from visionlora.dynamics.base import StepContext
from visionlora.ranks.controller import Controller


class BlendSchedule(Controller):
    """Lowers `blend_weight`, the share of the initial factors with `blend="add"`, linearly to 0.

    The share is part of every site's configuration, so checkpoints and files have it.
    """

    def begin(self) -> None:
        """Remember the share of the beginning."""
        self.start = float(self._config.blend_weight)

    @property
    def _config(self) -> Any:
        """The configuration of the adapter at this step."""
        return self.places[0].delta.config

    def on_step_end(self, context: StepContext) -> None:
        """Set the share of the next step."""
        if self._config.blend == "add":
            left = max(0.0, 1 - (context.step + 1) / self.steps)
            lowered = replace(self._config, blend_weight=self.start * left)
            for place in self.places:
                place.delta.config = lowered

    def state_dict(self) -> dict[str, Any]:
        """Return where the share started."""
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore where the share started."""
        self.start = state["start"]
