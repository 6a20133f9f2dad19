"""The command `video`: follow an object in one's own video, with the result saved."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from tasks.tracking.images import Frame
from tasks.tracking.trackers.base import Output, Tracker
from tasks.tracking.trackers.catalogue import TrackerConfig
from tasks.tracking.video.drawing import annotate
from tasks.tracking.video.sources import Source, open_source
from tasks.tracking.video.writing import BoxFile, VideoFile
from visionlora.errors import ConfigError
from visionlora.training import Progress
from visionlora.training.interrupt import DeferredInterrupt

RUNS = Path("runs/tracking")
PROGRESS_SECONDS = 5.0
"""How often progress is said where there is no terminal for a bar."""


@dataclass(frozen=True, kw_only=True)
class VideoConfig(TrackerConfig):
    """Follow the object in a box through a video, a folder of images or the pictures of a webcam.

    Writes video.mp4, with the box drawn, and boxes.csv. Ctrl-C keeps what was tracked until then.
    """

    source: str
    """A video file, a folder of images, or the number of a webcam."""
    box: str
    """The object in the first frame: x,y,w,h in pixels; 0,0 is the upper left corner."""
    output: str | None = None
    """Folder of video.mp4 and boxes.csv; default runs/tracking/video-<name>."""
    fps: float | None = None
    """Speed of the written video; default that of the source, 30 for images."""
    frames: int | None = None
    """Stop after so many frames."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.frames is not None and self.frames < 1:
            raise ConfigError(f"--frames must be at least 1, got {self.frames}")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ConfigError(f"--fps must be above 0 and at most 1000, got {self.fps:g}")
        parse_box(self.box)


def parse_box(text: str) -> tuple[float, ...]:
    """Return the four numbers of `x,y,w,h`.

    Raises:
        ConfigError: the text is something else.
    """
    try:
        numbers = tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError:
        numbers = ()
    if len(numbers) != 4:
        raise ConfigError(f"--box is four numbers x,y,w,h; got {text!r}")
    return numbers


def run(config: VideoConfig, tracker: Tracker | None = None) -> dict[str, Any]:
    """Track, write video.mp4 and boxes.csv, and return what was done.

    Raises:
        VisionLoraError: a video, box, tracker or folder that cannot be used; frames before a
            damaged one are kept.
        KeyboardInterrupt: after Ctrl-C, when everything is written; a webcam just ends.
    """
    source = open_source(config.source)
    tracker = tracker or config.load()
    folder = Path(config.output or RUNS / f"video-{source.name}").expanduser()
    count = 0
    seconds = 1e-9
    with ExitStack() as stack:
        files: tuple[VideoFile, BoxFile] | None = None
        total = (
            config.frames
            if source.count is None
            else min(source.count, config.frames or source.count)
        )
        asked = stack.enter_context(DeferredInterrupt())
        progress = stack.enter_context(Progress(total, "track", plain_every=PROGRESS_SECONDS))
        for image in source.frames:
            began = perf_counter()
            output = _output(tracker, image, config, count)
            seconds += perf_counter() - began
            if files is None:  # the first box was good
                files = (
                    stack.enter_context(VideoFile(folder / "video.mp4", config.fps or source.fps)),
                    stack.enter_context(BoxFile(folder / "boxes.csv")),
                )
            text = f"{count}  {output.score:.2f}"
            files[0].write(annotate(image, output.box, text))
            files[1].write(output.box, output.score)
            count += 1
            progress.show(count, f"score {output.score:.2f} {count / seconds:.1f} frames/s")
            if asked.asked or count == config.frames:
                break
    fps = count / seconds
    _report(source, config, count, fps, folder, asked.asked)
    if asked.asked and not source.live:
        raise KeyboardInterrupt
    return {"frames": count, "fps": fps, "output": str(folder)}


def _output(tracker: Tracker, image: Frame, config: VideoConfig, count: int) -> Output:
    if count:
        return tracker.track(image)
    box = np.array(parse_box(config.box))
    tracker.init(image, box)
    return Output(box, 1.0)


def _report(
    source: Source, config: VideoConfig, count: int, fps: float, folder: Path, stopped: bool
) -> None:
    expected = source.count
    if expected is not None and count < expected and not stopped and count != config.frames:
        print(f"note: {config.source} ends after {count} of {expected} frames; is it damaged?")
    print(
        f"{count} frames, {fps:.1f} frames/s in the tracker (decoding, drawing and writing "
        f"excluded): {folder / 'video.mp4'}, {folder / 'boxes.csv'}"
    )
