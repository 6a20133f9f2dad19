"""Success, precision and normalised precision of one sequence, and their means over sequences.

    success(t)    = #(IoU > t) / N           t = 0, .05 ... 1     AUC = mean, OP50 = success(.5)
    precision(t)  = #(|c - c*| <= t) / N     t = 0, 1 ... 50 px   reported at 20 px
    normalised(t) = #(|(c - c*) / size*| <= t) / N   t = 0, .01 ... .5

One-pass evaluation: the first predicted box is replaced by the annotation, every sequence weighs
the same however long it is. Truth itself scores AUC 20/21 = 95.24, since no IoU exceeds t = 1.

Wu, Lim, Yang, "Object Tracking Benchmark", 2015; Muller et al., "TrackingNet", 2018,
arXiv:1803.10794 (normalised precision); Fan et al., "LaSOT", 2019, arXiv:1809.07845. What becomes
of absent targets, invalid annotations and bad boxes differs by toolkit: `protocols.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from tasks.tracking.evaluation.protocols import Protocol, get_protocol
from visionlora.errors import DataError

SUCCESS_THRESHOLDS = np.linspace(0.0, 1.0, 21)
PRECISION_THRESHOLDS = np.arange(51.0)
NORM_PRECISION_THRESHOLDS = np.linspace(0.0, 0.5, 51)
AT_50, AT_75, AT_20 = 10, 15, 20
"""Places of success(.5), success(.75), and both precision(20 px) and normalised(.20)."""

Boxes = Float[np.ndarray, "frames 4"]
Values = Float[np.ndarray, " frames"]
Columns = Float[np.ndarray, "4 frames"]


@dataclass(frozen=True)
class Curves:
    """Shares in 0..1 at the thresholds above."""

    success: Float[np.ndarray, " 21"]
    precision: Float[np.ndarray, " 51"]
    norm_precision: Float[np.ndarray, " 51"]


@dataclass(frozen=True)
class Figures:
    """Curves and the figures that are read from them, in percent."""

    curves: Curves
    protocol: Protocol

    @property
    def auc(self) -> float:
        """Area under the success curve."""
        return 100.0 * float(self.curves.success.mean())

    @property
    def op50(self) -> float:
        """Share of frames with IoU > .5."""
        return 100.0 * float(self.curves.success[AT_50])

    @property
    def op75(self) -> float:
        """Share of frames with IoU > .75."""
        return 100.0 * float(self.curves.success[AT_75])

    @property
    def precision(self) -> float:
        """Share of frames whose centre is at most 20 pixels off."""
        return 100.0 * float(self.curves.precision[AT_20])

    @property
    def norm_precision(self) -> float:
        """Normalised precision at .20, or the mean of its curve, as the protocol says."""
        curve = self.curves.norm_precision
        whole = self.protocol.norm_precision == "mean of curve"
        return 100.0 * float(curve.mean() if whole else curve[AT_20])

    def as_dict(self) -> dict[str, float]:
        """Return the five figures by the names that result files have."""
        names = ("auc", "precision", "norm_precision", "op50", "op75")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class SequenceScore(Figures):
    """The scores of one sequence, and what was special about its frames."""

    frames: int
    """N, by which counts are divided."""
    absent: int
    """Frames that fail because the target is not there."""
    invalid: int
    """Frames whose target is there and whose annotation is unusable."""
    copied: int
    """Predicted boxes replaced by the one before."""
    surplus: int
    """Predicted boxes beyond the annotation; negative if some are missing."""


@dataclass(frozen=True)
class Scores(Figures):
    """Means over sequences."""

    sequences: int
    dropped: int
    """Sequences without one success that the protocol leaves out of the mean."""


def score_sequence(
    truth: Boxes,
    predicted: Boxes,
    absent: Bool[np.ndarray, " frames"] | None = None,
    protocol: str = "pytracking",
    dataset: str = "lasot",
) -> SequenceScore:
    """Score one sequence; all boxes are `xywh` in the convention of the benchmark's own files.

    Args:
        truth: annotations (n, 4), nan rows where there is none.
        predicted: boxes, one per frame.
        absent: frames in which the target is not to be seen.
        protocol: a name in `PROTOCOLS`.
        dataset: the benchmark; a few rules differ on `lasot` and `uav123`.

    Raises:
        DataError: boxes that the protocol refuses.
    """
    rules = get_protocol(protocol)
    truth, predicted = _columns("annotations", truth), _columns("predicted boxes", predicted)
    if absent is not None and len(absent) != truth.shape[1]:
        raise DataError(f"{len(absent)} flags of absence for {truth.shape[1]} annotated frames")
    surplus = predicted.shape[1] - truth.shape[1]
    truth, predicted, copied = _repaired(truth, predicted, rules, dataset)
    predicted[:, 0] = truth[:, 0]
    if rules.invalid_in_precision == "measured":
        annotated = ~np.isnan(truth).any(axis=0)
        if not annotated.any():
            raise DataError("no frame is annotated")
        truth, predicted = truth[:, annotated], predicted[:, annotated]
    hidden, invalid = np.zeros((2, truth.shape[1]), dtype=bool)
    if rules.absent_fails and absent is not None:
        hidden[:] = absent
    if rules.invalid_in_precision != "measured":
        positive = truth[0 if rules.corner_must_be_positive else 2 :] > 0
        invalid[:] = ~positive.all(axis=0)
    overlap, centre, normalised = _errors(truth, predicted, rules)
    overlap[invalid | hidden] = -1.0
    centre[invalid], normalised[invalid] = rules.invalid_centre_error(dataset), -1.0
    centre[hidden], normalised[hidden] = np.inf, np.inf
    curves = Curves(
        share_above(overlap, SUCCESS_THRESHOLDS),
        share_within(centre, PRECISION_THRESHOLDS),
        share_within(normalised, NORM_PRECISION_THRESHOLDS),
    )
    return SequenceScore(
        curves,
        rules,
        frames=truth.shape[1],
        absent=int(hidden.sum()),
        invalid=int((invalid & ~hidden).sum()),
        copied=copied,
        surplus=surplus,
    )


def average(scores: Sequence[Figures]) -> Scores:
    """Return the mean curves over sequences of one protocol."""
    if not scores:
        raise DataError("no sequence to average over")
    rules = scores[0].protocol
    curves = mean_curves(scores, rules.drops_failures)
    dropped = sum(not score.curves.success.any() for score in scores)
    dropped = dropped if rules.drops_failures else 0
    return Scores(curves, rules, sequences=len(scores), dropped=dropped)


def mean_curves(scores: Sequence[Figures], drops_failures: bool = False) -> Curves:
    """Return mean curves; where failures are dropped, of those with a success if there are any."""

    def mean(curves: list[Values]) -> Values:
        some = [curve for curve in curves if curve.any()] if drops_failures else curves
        return np.mean(some or curves, axis=0)

    return Curves(
        success=mean([score.curves.success for score in scores]),
        precision=mean([score.curves.precision for score in scores]),
        norm_precision=mean([score.curves.norm_precision for score in scores]),
    )


def share_above(values: Values, thresholds: Values) -> Values:
    """Return for each threshold the share of values strictly above it; nan is above none."""
    passed = np.searchsorted(thresholds, np.where(np.isnan(values), -1.0, values), side="left")
    counts = np.bincount(passed, minlength=len(thresholds) + 1)
    return counts[::-1].cumsum()[::-1][1:] / len(values)


def share_within(errors: Values, thresholds: Values) -> Values:
    """Return for each threshold the share of errors not above it; nan is within none."""
    first = np.searchsorted(thresholds, np.where(np.isnan(errors), np.inf, errors), side="left")
    return np.bincount(first, minlength=len(thresholds) + 1).cumsum()[:-1] / len(errors)


def _columns(what: str, boxes: Boxes) -> Columns:
    """Return x, y, w, h as rows of a contiguous array, with which all arithmetic is fast."""
    array = np.asarray(boxes, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 4 or not len(array):
        raise DataError(f"{what} must be rows of x, y, w, h; got shape {array.shape}")
    return np.ascontiguousarray(array.T)


def _repaired(
    truth: Columns, predicted: Columns, rules: Protocol, dataset: str
) -> tuple[Columns, Columns, int]:
    """Return boxes of one length, a copy of the previous one for bad ones, and how many those are.

    A bad box stays where the annotation is nan, and the first box is never replaced here; both
    as in the toolkits.
    """
    predicted = predicted[:, : truth.shape[1]].copy()
    given, missing = predicted.shape[1], truth.shape[1] - predicted.shape[1]
    if missing and rules.refuses_short(dataset):
        raise DataError(
            f"{given} boxes for {truth.shape[1]} annotated frames, which protocol "
            f"{rules.name!r} refuses on {dataset}; 'got10k' scores as many as there are"
        )
    if rules.short == "cut":
        truth, missing = truth[:, :given], 0
    nan, size = np.isnan(predicted).any(axis=0), predicted[2:]
    bad = (size == 0).any(axis=0)
    if rules.bad_box == "refuse":
        broken = nan | (size < 0).any(axis=0)
        if broken.any():
            row = int(broken.argmax())
            box = ",".join(f"{value:g}" for value in predicted[:, row])
            raise DataError(
                f"box {row + 1} is {box}; protocol {rules.name!r} refuses nan and negative sizes "
                "('lasot' takes the box before instead)"
            )
    elif rules.bad_box == "copy":
        bad |= nan | (size < 0).any(axis=0)
    else:
        bad[:] = False
    bad &= ~np.isnan(truth[:, :given]).any(axis=0)
    bad[0] = False
    if bad.any():
        source = np.maximum.accumulate(np.where(bad, 0, np.arange(given)))
        predicted = predicted[:, source]
    if missing:
        predicted = np.pad(predicted, ((0, 0), (0, missing)))
    return truth, predicted, int(bad.sum())


def _errors(truth: Columns, predicted: Columns, rules: Protocol) -> tuple[Values, Values, Values]:
    """Return IoU, distance of the centres, and that distance in units of the annotated size."""
    apart = predicted[:2] - truth[:2] + (predicted[2:] - truth[2:]) / 2
    size = truth[2:]
    if rules.invalid_in_precision == "measured":
        size = np.maximum(size, 1.0)
    far = np.minimum(predicted[:2] + predicted[2:], truth[:2] + truth[2:])
    sides = (far - np.maximum(predicted[:2], truth[:2])).clip(min=0.0)
    shared = sides[0] * sides[1]
    union = predicted[2] * predicted[3] + truth[2] * truth[3] - shared
    with np.errstate(divide="ignore", invalid="ignore"):
        # Rounding may lift the overlap of equal boxes above 1, which must stay a failure there.
        overlap, normalised = np.minimum(shared / union, 1.0), apart / size
        return overlap, np.sqrt((apart**2).sum(axis=0)), np.sqrt((normalised**2).sum(axis=0))
