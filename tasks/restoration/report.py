"""The result of an evaluation: what is written to result.json, and what is printed."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.restoration.figures import CHANNELS, Mean, Measured
from tasks.restoration.inference.restorer import Restorer
from tasks.restoration.metrics import Channel

BASE_ALONE = "none"
"""The method of a network without adapter."""


def result_of(
    restorer: Restorer,
    measured: Sequence[Measured],
    found: Mapping[str, Mean],
    channel: Channel,
    crop: int,
) -> dict[str, Any]:
    """Return the figures and costs; psnr and ssim are those of the channel."""
    card, file = restorer.card, restorer.adapter_file
    values = {name: _rounded(item.value) for name, item in found.items()}
    seconds = sum(item.seconds for item in measured)
    gains = [item.gain(channel) for item in measured]
    return {
        "base": restorer.base.name,
        "method": card.method if card else BASE_ALONE,
        "images": len(measured),
        **{
            f"{figure}{of}": values[f"{figure}_{channel}{of}"]
            for of in ("", "_input")
            for figure in ("psnr", "ssim")
        },
        "channel": channel,
        "crop": crop,
        **values,
        "exact": found[f"psnr_{channel}"].left_out,
        "worse": sum(gain < 0 for gain in gains),
        "trainable_parameters": card.trainable if card else 0,
        "trainable_percent": round(card.percent, 4) if card else 0.0,
        "adapter_bytes": file.stat().st_size if file else 0,
        "seconds_per_megapixel": round(seconds / sum(item.megapixels for item in measured), 4),
    }


def lines(
    restorer: Restorer, measured: Sequence[Measured], found: Mapping[str, Mean], channel: Channel
) -> list[str]:
    """Return what is printed: the means before and after, and what to beware of."""
    names = [name for name in found if not name.endswith("_input")]
    told = ["           " + "".join(f"{name.replace('_', ' '):>10}" for name in names)]
    for what, of in (("input", "_input"), ("restored", "")):
        numbers = (found[f"{name}{of}"].value for name in names)
        told.append(f"{what:<11}" + "".join(f"{_shown(number):>10}" for number in numbers))
    for of, what in (("", "restored"), ("_input", "input")):
        exact = max(found[f"psnr_{name}{of}"].left_out for name in CHANNELS)
        if exact:
            told.append(
                f"warning: {exact} {what} pictures equal their target, inf dB, and are not in the "
                "mean PSNR"
            )
    before, after = (found[f"psnr_{channel}{of}"].value for of in ("_input", ""))
    worse = sum(item.gain(channel) < 0 for item in measured)
    if before is not None and after is not None and after < before:
        told.append(
            f"warning: the pictures are worse than they were, by {before - after:.2f} dB on "
            f"average; {worse} of {len(measured)} lost"
        )
    elif worse:
        told.append(f"note: {worse} of {len(measured)} pictures are worse than they were")
    who = f"{restorer.card.method} on {restorer.base.name}" if restorer.card else "the base alone"
    return [f"{len(measured)} pictures, {who}", *told]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _shown(value: float | None) -> str:
    return "inf" if value is None else f"{value:.4f}"
