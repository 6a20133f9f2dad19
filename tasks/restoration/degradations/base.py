"""What a degradation is: a function of a picture and a generator that says what it drew."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

Image = Float[np.ndarray, "h w 3"]
"""RGB, float32, in [0, 1]."""
Drawn = dict[str, Any]
"""Parameters that were drawn, as plain values."""
Degradation = Callable[[Image, np.random.Generator], tuple[Image, Drawn]]


def rounded(value: float) -> float:
    """Return a drawn number as it is written down."""
    return round(float(value), 4)
