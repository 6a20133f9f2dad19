"""Looking at a change without the noise that some methods draw while training."""

from collections.abc import Iterator
from contextlib import contextmanager

from visionlora.methods.base import Delta


@contextmanager
def without_noise(delta: Delta) -> Iterator[Delta]:
    """Put a Delta into evaluation mode inside a `with` block."""
    training = delta.training
    try:
        yield delta.eval()
    finally:
        delta.train(training)
