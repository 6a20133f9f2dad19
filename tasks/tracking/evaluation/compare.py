"""Score folders of results, of several trackers at once, in one report.

    python scripts/track.py compare --results DIR [DIR ...] --benchmark lasot --root DIR

All trackers are scored on the same sequences: with `--skip-missing` on those that all have. LaSOT
needs no frames for it: the root may be the `annos` folder of its evaluation toolkit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.tracking.evaluation.protocols import ProtocolName
from tasks.tracking.evaluation.report import markdown, write_report
from tasks.tracking.evaluation.result_files import FormatName, Rounding
from tasks.tracking.evaluation.result_folder import (
    Result,
    find_files,
    missing_text,
    read_result,
    tracker_name,
)
from tasks.tracking.evaluation.scoring import Evaluation, score_tracker
from tasks.tracking.evaluation.submission import export
from tasks.tracking.sequences import lasot
from tasks.tracking.sequences.catalogue import find_sequences, load_benchmark
from tasks.tracking.sequences.found import chosen
from tasks.tracking.sequences.frames import NumberedFrames
from tasks.tracking.sequences.sequence import Sequence as Video
from visionlora.errors import ConfigError, DataError, nearest

OUTPUT = "runs/tracking/compare"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Score folders of result files and write tables, CSV, JSON and plots."""

    results: list[str]
    """Folders of result files, one per tracker, in any benchmark's format."""
    root: str
    """Where the benchmark lies; for LaSOT also the annos folder of its toolkit."""
    benchmark: str = "lasot"
    """lasot, lasot_ext, got10k_val, got10k, trackingnet, tnl2k, uav123, otb, nfs, folder, ..."""
    names: list[str] | None = None
    """What to call the trackers, in the order of the folders; default the folders' own names."""
    sequences: list[str] | None = None
    """Names, apart by commas or spaces; default all of the benchmark."""
    protocol: ProtocolName = "pytracking"
    """The convention; figures of different ones are not comparable."""
    skip_missing: bool = False
    """Score the sequences that are there and that all trackers have."""
    export: FormatName | None = None
    """Also write the results as the server or toolkit wants them, instead of scores if hidden."""
    round: Rounding = "none"
    """How exported boxes are rounded; int truncates as old tools do."""
    output: str = OUTPUT
    """Folder of the report; files in it are replaced."""

    def __post_init__(self) -> None:
        """Check that names fit, and that rounding has something to round."""
        if not self.results:
            raise ConfigError("--results needs at least one folder")
        if self.names is not None and len(self.names) != len(self.results):
            raise ConfigError(
                f"--names has {len(self.names)} for {len(self.results)} folders of --results"
            )
        chosen(self.sequences)
        if self.round != "none" and self.export is None:
            raise ConfigError("--round rounds what --export writes; give both or none")

    @property
    def trackers(self) -> list[str]:
        """Names of the trackers, all different."""
        names = self.names or [tracker_name(folder) for folder in self.results]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"two folders are called {twice[0]!r}; tell them apart with --names")
        return names


def run(config: CompareConfig) -> list[Evaluation]:
    """Score, print and write; return the evaluations in the order of the folders.

    Where only a server knows the truth there is nothing to score, and with `--export` none is.
    """
    trackers = config.trackers
    videos, results = _read(config, *_videos(config))
    if config.export is not None:
        for tracker in trackers:
            path = export(
                config.export, config.output, tracker, videos, results[tracker], config.round
            )
            print(f"wrote {path}")
        if all(len(video.boxes) == 1 < len(video.frames) for video in videos):
            return []
    evaluations = [
        score_tracker(tracker, videos, results[tracker], config.protocol) for tracker in trackers
    ]
    print(markdown(evaluations))
    for path in write_report(evaluations, config.output):
        print(f"wrote {path}")
    return evaluations


def _videos(config: CompareConfig) -> tuple[list[Video], int]:
    """Return the sequences on disk, and how many there should be."""
    annos, names = Path(config.root).expanduser(), chosen(config.sequences)
    if config.benchmark == "lasot" and (annos / "absent").is_dir():
        videos = [_annotated(annos, name) for name in names or lasot.testing_set()]
        return videos, len(videos)
    wanted = (config.benchmark, config.root, names, config.skip_missing)
    videos = load_benchmark(*wanted)
    return videos, len(videos) + len(find_sequences(*wanted).missing)


def _annotated(annos: Path, name: str) -> Video:
    """Return a sequence of LaSOT without its frames; scores need none."""
    if not (annos / f"{name}.txt").is_file():
        known = [path.stem for path in annos.glob("*.txt")]
        raise DataError(f"no annotation of sequence {name!r} in {annos}{nearest(name, known)}")
    boxes, absent, attributes = lasot.read_annotation(annos, name)
    frames = NumberedFrames(annos / name, "{:08d}.jpg", range(1, len(boxes) + 1))
    return Video(name, frames, boxes, absent, lasot.ORIGIN, attributes, "lasot")


def _read(
    config: CompareConfig, videos: Sequence[Video], wanted: int
) -> tuple[list[Video], dict[str, dict[str, Result]]]:
    """Return the sequences that all trackers have, and all results."""
    names = [video.name for video in videos]
    files = {}
    for tracker, folder in zip(config.trackers, config.results, strict=True):
        found = find_files(folder, names, config.benchmark)
        missing = [name for name in names if name not in found]
        if missing and (not found or not config.skip_missing):
            advice = "; --skip-missing scores the others" if found else ""
            raise DataError(missing_text(folder, missing, len(names)) + advice)
        files[tracker] = found
    kept = [video for video in videos if all(video.name in found for found in files.values())]
    if not kept:
        raise DataError("no sequence has results of all trackers")
    if len(kept) < wanted:
        print(f"used {len(kept)} of {wanted} sequences: those on disk that all trackers have")
    return kept, {
        tracker: {video.name: read_result(found[video.name]) for video in kept}
        for tracker, found in files.items()
    }
