"""The four ways in which the field scores the same boxes, as switches of one function.

| | lasot | pytracking | stark | got10k |
|---|---|---|---|---|
| target absent | failure | failure | failure | not looked at |
| annotation invalid if | x, y, w or h <= 0 | x, y, w or h <= 0 | w or h <= 0 | never |
| it then counts in P | right | wrong (UAV: right) | wrong (UAV: right) | as its numbers say |
| it then counts in P_norm | right | right | right | with sizes raised to 1 |
| predicted nan | previous box | refused | refused | as it is |
| predicted w or h < 0 | previous box | refused | refused | as it is |
| predicted w or h = 0 | previous box | previous box | previous box | as it is |
| too few boxes | refused | LaSOT: refused, else zeros | as pytracking | annotation is cut |
| P_norm | at .20 | at .20 | at .20 | mean of the curve |
| sequence without one success | left out of the mean | kept | kept | kept |

Too many boxes are cut everywhere (LaSOT's monkey-17 has more images than annotations).

Sources: LaSOT evaluation toolkit (MATLAB), pytracking, STARK and OSTrack, got10k toolkit. Two
readings are ours: an annotation with nan is invalid on every data set (pytracking stops with an
error outside UAV123), and absent frames are failures on every data set that flags them
(pytracking counts them right in P_norm outside LaSOT).
"""

from dataclasses import dataclass
from typing import Literal, get_args

from visionlora.errors import ConfigError, nearest

ProtocolName = Literal["pytracking", "lasot", "stark", "got10k"]


@dataclass(frozen=True)
class Protocol:
    """One convention; the fields are the rows of the table above."""

    name: ProtocolName
    absent_fails: bool
    """Whether flags of absent targets are read, and such frames are failures."""
    corner_must_be_positive: bool
    """Whether x <= 0 or y <= 0 makes an annotation invalid, as w <= 0 or h <= 0 does."""
    invalid_in_precision: Literal["right", "wrong", "measured"]
    bad_box: Literal["copy", "refuse", "keep"]
    """Predicted nan or negative size. Size zero copies the previous box, too, unless `keep`."""
    short: Literal["refuse", "pad", "cut"]
    """Fewer boxes than annotations; `pad` refuses on LaSOT."""
    norm_precision: Literal["at .20", "mean of curve"]
    drops_failures: bool
    """Whether a sequence whose curve is zero everywhere is left out of the mean."""

    def invalid_centre_error(self, dataset: str) -> float:
        """Return the distance that an invalid annotation stands for: -1 right, inf wrong."""
        right = self.invalid_in_precision == "right" or dataset.startswith("uav")
        return -1.0 if right else float("inf")

    def refuses_short(self, dataset: str) -> bool:
        """Whether fewer boxes than annotations are an error on this data set."""
        return self.short == "refuse" or (self.short == "pad" and dataset == "lasot")


PROTOCOLS: dict[str, Protocol] = {
    "pytracking": Protocol(
        name="pytracking",
        absent_fails=True,
        corner_must_be_positive=True,
        invalid_in_precision="wrong",
        bad_box="refuse",
        short="pad",
        norm_precision="at .20",
        drops_failures=False,
    ),
    "lasot": Protocol(
        name="lasot",
        absent_fails=True,
        corner_must_be_positive=True,
        invalid_in_precision="right",
        bad_box="copy",
        short="refuse",
        norm_precision="at .20",
        drops_failures=True,
    ),
    "stark": Protocol(
        name="stark",
        absent_fails=True,
        corner_must_be_positive=False,
        invalid_in_precision="wrong",
        bad_box="refuse",
        short="pad",
        norm_precision="at .20",
        drops_failures=False,
    ),
    "got10k": Protocol(
        name="got10k",
        absent_fails=False,
        corner_must_be_positive=False,
        invalid_in_precision="measured",
        bad_box="keep",
        short="cut",
        norm_precision="mean of curve",
        drops_failures=False,
    ),
}
assert tuple(PROTOCOLS) == get_args(ProtocolName)


def get_protocol(name: str) -> Protocol:
    """Return the protocol of that name."""
    if name not in PROTOCOLS:
        raise ConfigError(
            f"unknown protocol {name!r}{nearest(name, PROTOCOLS)}; known: {', '.join(PROTOCOLS)}"
        )
    return PROTOCOLS[name]
