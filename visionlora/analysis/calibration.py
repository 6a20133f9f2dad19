r"""Calibration: how far predicted probabilities are from how often they come true.

With samples sorted into bins b of n_b by their confidence, `gap_b = |mean correct - mean
confidence|` inside the bin, n samples and K classes:

| metric | definition | bins |
|---|---|---|
| ECE | sum_b n_b / n gap_b of the predicted class | equal width |
| class-wise ECE | the same for every class's own probability, averaged over classes | equal width |
| MCE | max_b gap_b of the predicted class | equal width |
| ACE | sum_b n_b / n gap_b of the predicted class | equal mass |
| thresholded ACE | the same over all class probabilities of at least `threshold` | equal mass |
| Brier score | mean over samples of the squared distance to the one-hot label, 0 to 2 | - |

Bins of equal width are `(lower, upper]`; the first one holds 0 too. Bins of equal mass follow the
sorted confidences and differ by one sample at most. All sums run in float64. Guo et al. 2017 (arXiv
1706.04599) use ECE and MCE with 15 bins, many papers 10; ACE is from Nixon et al. 2019 (arXiv
1904.01685), here over the predicted class, as HypeLoRA reports it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visionlora.errors import ConfigError, DataError


def expected_calibration_error(
    probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"], bins: int = 15
) -> float:
    """Return the ECE.

    Args:
        probabilities: softmax outputs; rows sum to 1.
        labels: the true classes.
        bins: number of equally wide bins.

    Raises:
        DataError: no samples, rows that are no distribution, or labels out of range.
        ConfigError: fewer than one bin.
    """
    confidence, correct = _predicted(*_checked(probabilities, labels, bins))
    return _weighted_gap(*_equal_width(confidence, correct, bins))


def classwise_calibration_error(
    probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"], bins: int = 15
) -> float:
    """Return the mean over classes of the ECE of that class's probability; raises as the ECE."""
    probabilities, labels = _checked(probabilities, labels, bins)
    errors = [
        _weighted_gap(*_equal_width(probabilities[:, k], (labels == k).double(), bins))
        for k in range(probabilities.shape[1])
    ]
    return sum(errors) / len(errors)


def maximum_calibration_error(
    probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"], bins: int = 15
) -> float:
    """Return the MCE, the largest gap of any bin; raises as the ECE."""
    confidence, correct = _predicted(*_checked(probabilities, labels, bins))
    _, gap = _equal_width(confidence, correct, bins)
    return float(gap.max())


def adaptive_calibration_error(
    probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"], bins: int = 15
) -> float:
    """Return the ACE; raises as the ECE."""
    confidence, correct = _predicted(*_checked(probabilities, labels, bins))
    return _weighted_gap(*_equal_mass(confidence, correct, bins))


def thresholded_calibration_error(
    probabilities: Float[Tensor, "samples classes"],
    labels: Int[Tensor, " samples"],
    bins: int = 15,
    threshold: float = 1e-3,
) -> float:
    """Return the ACE over all class probabilities of at least `threshold`; raises as the ECE.

    With many classes most probabilities are close to zero and would hide the others.
    """
    probabilities, labels = _checked(probabilities, labels, bins)
    correct = torch.nn.functional.one_hot(labels, probabilities.shape[1]).double()
    kept = probabilities >= threshold
    if not bool(kept.any()):
        return 0.0
    return _weighted_gap(*_equal_mass(probabilities[kept], correct[kept], bins))


def brier_score(
    probabilities: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"]
) -> float:
    """Return the Brier score; raises as the ECE."""
    probabilities, labels = _checked(probabilities, labels, 1)
    goal = torch.nn.functional.one_hot(labels, probabilities.shape[1])
    return float((probabilities - goal).square().sum(1).mean())


def _checked(probabilities: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    if bins < 1:
        raise ConfigError(f"calibration: bins must be at least 1, got {bins}")
    if probabilities.dim() != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise DataError(
            "calibration needs probabilities (samples, classes) and one label per sample, got "
            f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        )
    probabilities = probabilities.detach().double().cpu()
    labels = labels.detach().long().cpu()
    total = probabilities.sum(1)
    # Rows that were rounded to half precision still pass; logits do not.
    if not bool((probabilities >= 0).all()) or not bool(((total - 1).abs() < 0.05).all()):
        raise DataError(
            "calibration needs probabilities, whose rows sum to 1; apply softmax to logits first"
        )
    if bool((labels < 0).any()) or bool((labels >= probabilities.shape[1]).any()):
        raise DataError(
            f"labels must lie in 0..{probabilities.shape[1] - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    return probabilities, labels


def _predicted(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability of the predicted class, and whether it is the true one."""
    confidence, prediction = probabilities.max(1)
    return confidence, (prediction == labels).double()


def _equal_width(confidence: Tensor, correct: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    return _gaps(confidence, correct, torch.bucketize(confidence.contiguous(), edges), bins)


def _equal_mass(confidence: Tensor, correct: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    order = torch.argsort(confidence, stable=True)
    index = torch.empty_like(order)
    for number, part in enumerate(torch.tensor_split(order, bins)):
        index[part] = number
    return _gaps(confidence, correct, index, bins)


def _gaps(confidence: Tensor, correct: Tensor, index: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Return the share of the samples in each bin, and its gap (0 where it is empty)."""
    count = torch.bincount(index, minlength=bins).double()
    difference = torch.bincount(index, correct - confidence, minlength=bins)
    return count / len(confidence), difference.abs() / count.clamp_min(1)


def _weighted_gap(share: Tensor, gap: Tensor) -> float:
    return float((share * gap).sum())
