"""One table of tolerances for the whole suite, and the comparison that uses it."""

import torch

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
    """Compare with the tolerance of the coarser dtype, relative to the expected size."""
    dtype = (
        actual.dtype if TOLERANCES[actual.dtype] > TOLERANCES[expected.dtype] else expected.dtype
    )
    tolerance = factor * TOLERANCES[dtype]
    size = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.to(torch.float64), expected.to(torch.float64), atol=tolerance * size, rtol=tolerance
    )
