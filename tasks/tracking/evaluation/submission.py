"""Results as other tools want them: zip files for the two servers, folders for the two toolkits.

| target | what is written |
|---|---|
| got10k | `<tracker>.zip` with `<tracker>/<sequence>/<sequence>_001.txt` and `..._time.txt` |
| trackingnet | `<tracker>.zip` with `<sequence>.txt` at the top |
| lasot | `<tracker>_tracking_result/<sequence>.txt` |
| pytracking | `<tracker>/<sequence>.txt` and `<sequence>_time.txt`, names with uav_ or nfs_ |

Up to three repetitions go into GOT-10k's zip as `_001` to `_003`; the others take the first.
LoRAT's authors sent the servers boxes grown to whole pixels: `--round outward`.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tasks.tracking.evaluation.result_files import FormatName, Rounding, boxes_text, times_text
from tasks.tracking.evaluation.result_folder import PREFIXES, SUFFIX, Result
from tasks.tracking.sequences.sequence import Sequence as Video
from visionlora.errors import DataError
from visionlora.io.atomic import write_atomically, write_text_atomically

FIXED_TIME = (1980, 1, 1, 0, 0, 0)
"""Of every member, so that equal results give equal files."""


def export(
    target: FormatName,
    folder: str | Path,
    tracker: str,
    videos: Sequence[Video],
    results: Mapping[str, Result],
    rounding: Rounding = "none",
) -> Path:
    """Write the results of all `videos` for `target` below `folder`; return the zip or folder.

    Raises:
        DataError: a result has not one box per frame, or the server's seconds are missing.
    """
    home = Path(folder)
    members = _members(target, tracker, videos, results, rounding)
    if target in ("got10k", "trackingnet"):
        texts = dict(members)
        return write_atomically(home / f"{tracker}.zip", lambda path: _zip(path, texts))
    for name, text in members:
        write_text_atomically(home / name, text)
    return home / (f"{tracker}{SUFFIX}" if target == "lasot" else tracker)


def _members(
    target: FormatName,
    tracker: str,
    videos: Sequence[Video],
    results: Mapping[str, Result],
    rounding: Rounding,
) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every file."""
    for video in videos:
        name, result = video.name, results[video.name]
        for boxes in result.repeats:
            if len(boxes) != len(video.frames):
                raise DataError(
                    f"{tracker}, sequence {name}: {len(boxes)} boxes for {len(video.frames)} frames"
                )
        texts = [boxes_text(boxes, target, rounding) for boxes in result.repeats]
        times = None if result.seconds is None else times_text(result.seconds)
        if target == "got10k":
            if times is None:
                raise DataError(
                    f"{tracker}, sequence {name}: GOT-10k's server wants the seconds of every "
                    f"frame; there is no {name}_time.txt"
                )
            stem = f"{tracker}/{name}/{name}"
            yield from ((f"{stem}_{n:03d}.txt", text) for n, text in enumerate(texts, start=1))
            yield f"{stem}_time.txt", times
        elif target == "trackingnet":
            yield f"{name}.txt", texts[0]
        elif target == "lasot":
            yield f"{tracker}{SUFFIX}/{name}.txt", texts[0]
        else:
            stem = f"{tracker}/{PREFIXES.get(video.benchmark, '')}{name}"
            yield f"{stem}.txt", texts[0]
            if times is not None:
                yield f"{stem}_time.txt", times


def _zip(path: Path, texts: Mapping[str, str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as stored:
        for name, text in texts.items():
            member = zipfile.ZipInfo(name, FIXED_TIME)
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            stored.writestr(member, text)
