"""The suite; importing it brings the checker that `--jaxtyping-packages` names."""

from tests import shapes

__all__ = ["shapes"]
