"""The command `evaluate`: run a tracker on a benchmark and score it.

    results/<sequence>.txt          boxes, as soon as a sequence is finished
    result.json                     the figures, in percent, with the protocol they follow
    report.md, *.csv, *.json, *.png the same in tables and plots, see evaluation/report.py

A run that was stopped goes on with `--resume`: finished sequences are read, not tracked again. A
sequence with a damaged frame is left out, the others are finished, and the run ends with an error.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.tracking.evaluation.protocols import ProtocolName
from tasks.tracking.evaluation.report import markdown, write_report
from tasks.tracking.evaluation.result_files import FormatName, Rounding
from tasks.tracking.evaluation.result_folder import Result
from tasks.tracking.evaluation.scoring import score_tracker
from tasks.tracking.evaluation.submission import export
from tasks.tracking.results import SERVERS, Results
from tasks.tracking.runner import Failure, track_all
from tasks.tracking.sequences.catalogue import find_sequences, load_benchmark
from tasks.tracking.sequences.found import chosen
from tasks.tracking.sequences.sequence import Sequence as Video
from tasks.tracking.trackers.base import Tracker
from tasks.tracking.trackers.catalogue import TrackerConfig, parameter_counts
from visionlora.errors import ConfigError, DataError
from visionlora.training import Progress, RunDirectory
from visionlora.training.output import open_run, taken_back_on_error

RUNS = Path("runs/tracking")
MAY_CHANGE = (
    *("output", "resume", "overwrite", "device", "root", "sequences", "skip_missing"),
    *("batch", "protocol", "plots", "export", "round"),
)
"""Settings that may differ when a run is resumed: none of them changes a box."""
FIGURES = ("auc", "precision", "norm_precision", "op50", "op75")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TrackerConfig):
    """Run a tracker on the sequences of a benchmark and score it."""

    benchmark: str = "lasot"
    """lasot, lasot_ext, got10k, trackingnet, tnl2k, uav123, otb, nfs, folder, ..."""
    root: str
    """Folder of the benchmark."""
    sequences: list[str] | None = None
    """Names, apart by commas or spaces; default all of the benchmark."""
    skip_missing: bool = False
    """Take the sequences that are there instead of refusing an incomplete benchmark."""
    protocol: ProtocolName = "pytracking"
    """Convention of the figures: pytracking, lasot, stark or got10k."""
    batch: int = 1
    """Sequences that advance together in one batch; the boxes are the same."""
    plots: bool = True
    """Whether curves are drawn."""
    export: FormatName | None = None
    """Also write the results as a server or toolkit wants them; the servers' sets always are."""
    round: Rounding = "none"
    """How exported boxes are rounded; int truncates as old tools do."""
    output: str | None = None
    """Folder of the results; default runs/tracking/evaluate-<tracker>-<benchmark>."""
    resume: bool = False
    """Go on with the run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.batch < 1:
            raise ConfigError(f"--batch must be at least 1, got {self.batch}")
        chosen(self.sequences)
        if self.round != "none" and self.export is None and self.benchmark not in SERVERS:
            raise ConfigError("--round rounds what --export writes; give both or none")


def run(config: EvaluateConfig, tracker: Tracker | None = None) -> dict[str, Any]:
    """Carry out an evaluation and return what is written to its result.json.

    Args:
        config: The settings.
        tracker: The tracker itself, instead of the one that `config` names.

    Raises:
        VisionLoraError: a setting, tracker, sequence or file that cannot be used; sequences that
            were finished before are kept.
    """
    videos = _videos(config)
    tracker = tracker or config.load()
    default = RUNS / f"evaluate-{config.tracker}-{config.benchmark}"
    directory, made = open_run(
        config.output, default, resume=config.resume, overwrite=config.overwrite
    )
    with taken_back_on_error(made):
        directory.write_config(config, volatile=MAY_CHANGE)
    results = Results(directory.path / "results")
    if config.overwrite:
        results.clear()
    found = _track(config, tracker, videos, results)
    return _score(config, tracker, videos, found, directory)


def _videos(config: EvaluateConfig) -> list[Video]:
    """Read the sequences, and say how many are not there."""
    wanted = (config.benchmark, config.root, chosen(config.sequences), config.skip_missing)
    found = find_sequences(*wanted)
    if found.missing:
        total = len(found.present) + len(found.missing)
        print(f"note: {len(found.present)} of {total} sequences are used, the others are missing")
    return load_benchmark(*wanted)


def _track(
    config: EvaluateConfig, tracker: Tracker, videos: Sequence[Video], results: Results
) -> dict[str, Result]:
    """Return the results of all sequences, tracking those that are not on disk.

    Raises:
        DataError: some sequences could not be tracked.
    """
    waiting = [video for video in videos if results.load(video) is None]
    if len(waiting) < len(videos):
        print(f"{len(videos) - len(waiting)} of {len(videos)} sequences are finished already")
    failures: list[Failure] = []
    done, seconds = 0, 0.0
    device = getattr(tracker, "device", None)
    with Progress(sum(map(len, waiting)), "track") as progress:

        def told(frames: int, spent: float) -> None:
            nonlocal done, seconds
            done, seconds = done + frames, seconds + spent
            progress.show(done, f"{done / max(seconds, 1e-9):.1f} frames/s in the tracker,")

        ahead = device is not None and device.type != "cpu"
        for item in track_all(tracker, waiting, batch=config.batch, ahead=ahead, on_frames=told):
            if isinstance(item, Failure):
                failures.append(item)
                print(f"{item.sequence.name}: {item.error}", file=sys.stderr, flush=True)
            else:
                results.save(item)
    if failures:
        names = ", ".join(item.sequence.name for item in failures[:3])
        more = f" and {len(failures) - 3} more" if len(failures) > 3 else ""
        raise DataError(
            f"{len(failures)} of {len(videos)} sequences cannot be tracked ({names}{more}): "
            f"{failures[0].error}. The others are finished and kept; mend these and use --resume, "
            "or leave them out with --sequences"
        )
    # What is scored is what the files hold, rounded as they are, in whole and resumed runs.
    loaded = {video.name: results.load(video) for video in videos}
    return {name: result for name, result in loaded.items() if result is not None}


def _score(
    config: EvaluateConfig,
    tracker: Tracker,
    videos: Sequence[Video],
    found: dict[str, Result],
    directory: RunDirectory,
) -> dict[str, Any]:
    """Score all results, write the report and result.json."""
    figures: dict[str, float | None] = dict.fromkeys(FIGURES)
    hidden = [video.name for video in videos if len(video.boxes) == 1 < len(video)]
    target = config.export or (SERVERS.get(config.benchmark) if hidden else None)
    if target is not None:
        print(
            f"wrote {export(target, directory.path, config.tracker, videos, found, config.round)}"
        )
    if hidden:
        print(f"note: no figures, only the first box of {len(hidden)} sequences is known here")
    else:
        evaluation = score_tracker(config.tracker, videos, found, config.protocol)
        figures |= evaluation.mean.as_dict()
        print(markdown([evaluation]))
        write_report([evaluation], directory.path, plots=config.plots)
    counts = parameter_counts(tracker)
    return directory.write_result(
        {
            "task": "tracking",
            "tracker": config.tracker,
            "benchmark": config.benchmark,
            "protocol": config.protocol,
            "sequences": len(videos),
            **{name: None if value is None else round(value, 4) for name, value in figures.items()},
            "fps": round(_speed(found), 2),
            "trainable_parameters": counts.trainable,
            "parameters": counts.total,
        }
    )


def _speed(found: dict[str, Result]) -> float:
    """Return all frames by all seconds of the tracker."""
    seconds = [result.seconds for result in found.values() if result.seconds is not None]
    return sum(map(len, seconds)) / max(float(sum(item.sum() for item in seconds)), 1e-9)
