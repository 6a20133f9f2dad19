"""A finished tracker meets another kind of picture: adapters beside full fine-tuning and the head.

python benchmarks/tracking_shift.py --photographs PHOTOS --root SEQUENCES      an hour on one core
python benchmarks/tracking_shift.py --photographs PHOTOS --root SEQUENCES --methods lora

The shift is a dark, grey and noisy camera (`night`). The tracker that ships is merged, so that what
it learnt is its base, and then trained on few shifted pairs: by adapters, in all linear layers, or
in token types and head alone; types and head are trained in all three. The rate of each is chosen
by the overlap on pairs of other photographs; the figures are those of the real sequences, shifted
and as they are, so that what is forgotten is seen too. Lines are appended to the file as they come.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike

import visionlora as vl
from benchmarks.lines import each, read
from benchmarks.step import check_json, count
from tasks.tracking.evaluation.result_folder import Result
from tasks.tracking.evaluation.scoring import score_tracker
from tasks.tracking.images import Frame, read_image
from tasks.tracking.model import add_adapter, build
from tasks.tracking.model.lorat import TRAINED, LoRAT
from tasks.tracking.model.variants import find_variant
from tasks.tracking.runner import Run, track_all
from tasks.tracking.sequences.catalogue import load_benchmark
from tasks.tracking.sequences.sequence import Sequence as Video
from tasks.tracking.trackers.base import Output, Tracker
from tasks.tracking.trackers.catalogue import TINY_WEIGHTS
from tasks.tracking.trackers.lorat import LoRATTracker
from tasks.tracking.training.batches import collate
from tasks.tracking.training.objective import pair_loss, pair_overlap
from tasks.tracking.training.optimizer import build_optimizer, prefixed_cosine
from tasks.tracking.training.photographs import Photographs
from tasks.tracking.training.samples import Batch, Sample, Samples
from tasks.tracking.training.synthetic import SyntheticPairs
from visionlora.dynamics.stepper import Stepper
from visionlora.training.cli import run_cli

RESULTS = Path(__file__).parent / "results" / "tracking_shift.jsonl"
RATES = {
    "lora": (3e-4, 1e-3, 3e-3),
    "full": (1e-4, 3e-4, 1e-3),
    "head": (1e-3, 3e-3, 1e-2),
}
RECIPES = {"lora": "lora(rank=8)", "full": "full", "head": None}
SEEDS, VALIDATION_SEED = (1, 2, 3), 101
STEPS, BATCH, WARMUP = 120, 8, 6
HELD_OUT = 8
"""Every so manieth photograph is for choosing the rate, and never trained on."""
VALIDATION_PAIRS = 128


def main(argv: list[str] | None = None) -> None:
    """Carry out what the command line asks for."""
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(1)
    train, other = split(Photographs(options.photographs))
    videos = load_benchmark("lasot", options.root, None, False)
    path = options.json
    trials = {
        f"{method}, rate {rate:g}": (method, rate)
        for method in options.methods
        for rate in RATES[method]
    }
    each(list(trials), path, lambda name: trial(name, *trials[name], train, other))
    finals = {
        f"{method}, seed {seed}": (method, best_rate(path, method), seed)
        for method in options.methods
        for seed in SEEDS
    }
    each(list(finals), path, lambda name: final(name, *finals[name], train, videos))
    each(["before"], path, lambda name: {"method": name, **scores(base(), videos)})
    each(["speed"], path, lambda name: {"method": name, **speed(videos[0])})


class Night(Samples):
    """Pairs that a dark, grey and noisy camera has seen."""

    def __call__(self, number: int) -> Sample:
        """Return sample `number`, both crops shifted."""
        sample = super().__call__(number)
        rng = np.random.default_rng((self.seed, number, 1))
        template, search = (
            torch.from_numpy(night(crop.permute(1, 2, 0).numpy(), rng)).permute(2, 0, 1)
            for crop in sample.row[:2]
        )
        return Sample(sample.row._replace(template=template, search=search), sample.unusable)


def night(image: Frame, rng: np.random.Generator) -> Frame:
    """Return a picture as a sensor would see it by night: blurred, grey, dark, noisy."""
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), 1.2)
    light = 90 * (grey / 255.0) ** 1.5
    noisy = light + rng.normal(0, 1, grey.shape) * (4 + 0.5 * np.sqrt(light))
    return np.repeat(noisy.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


class ByNight:
    """A tracker that sees every frame through the night camera."""

    def __init__(self, tracker: LoRATTracker) -> None:
        self.tracker = tracker
        self.name = tracker.name
        self._rng = np.random.default_rng(0)

    def init(self, image: Frame, box: ArrayLike) -> None:
        """Start on the object in `box`."""
        self.tracker.init(night(image, self._rng), box)

    def track(self, image: Frame) -> Output:
        """Find the object in the next frame."""
        return self.tracker.track(night(image, self._rng))


def split(photographs: Photographs) -> tuple[Photographs, Photographs]:
    """Return the photographs to train on, and those on which rates are chosen."""
    train, other = copy.copy(photographs), copy.copy(photographs)
    other.pyramids = photographs.pyramids[::HELD_OUT]
    train.pyramids = [p for i, p in enumerate(photographs.pyramids) if i % HELD_OUT]
    return train, other


def pairs(photographs: Photographs, seed: int) -> Night:
    """Return shifted pairs of some photographs."""
    shape = find_variant("tiny").shape
    return Night(SyntheticPairs(photographs, shape.search_px / shape.search_factor), shape, seed)


def batch(samples: Samples, start: int, size: int) -> Batch:
    """Return samples from number `start` on."""
    return collate([samples(number) for number in range(start, start + size)])


def base() -> LoRAT:
    """Return the tracker that ships, its adapters in its weights."""
    model = build("tiny", weights=TINY_WEIGHTS)
    vl.eject(model, merge=True)
    return model


def adapted(method: str, rate: float, photographs: Photographs, seed: int) -> tuple[LoRAT, float]:
    """Return the tracker after training on shifted pairs, and the seconds of a step."""
    model = base()
    recipe = RECIPES[method]
    if recipe is not None:
        add_adapter(model, recipe, seed=seed)
    vl.freeze_base(model, TRAINED)
    optimizer = build_optimizer(model.train(), rate, weight_decay=0.1)
    schedule = prefixed_cosine(STEPS, warmup=WARMUP, start=0.0, floor=0.0)
    stepper = Stepper(model, optimizer, clip_norm=1.0)
    samples = pairs(photographs, seed)
    seconds = 0.0
    for step in range(STEPS):
        made = batch(samples, step * BATCH, BATCH)
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * schedule(step)
        began = time.perf_counter()
        stepper.step([made], partial(pair_loss, model))
        seconds += time.perf_counter() - began
    return model.eval(), seconds / STEPS


def trial(
    name: str, method: str, rate: float, train: Photographs, other: Photographs
) -> dict[str, Any]:
    """Return the overlap on shifted pairs of photographs that were not trained on."""
    model, _ = adapted(method, rate, train, VALIDATION_SEED)
    samples = pairs(other, VALIDATION_SEED)
    found = [pair_overlap(model, batch(samples, at, 16)) for at in range(0, VALIDATION_PAIRS, 16)]
    iou = round(float(torch.cat(found).mean()), 4)
    return {"method": name, "what": method, "rate": rate, "validation_iou": iou}


def best_rate(path: Path, method: str) -> float:
    """Return the rate with the highest overlap."""
    lines = [line for line in read(path) if line.get("what") == method and "rate" in line]
    return float(max(lines, key=lambda line: line.get("validation_iou", -1.0))["rate"])


def final(
    name: str, method: str, rate: float, seed: int, train: Photographs, videos: Sequence[Video]
) -> dict[str, Any]:
    """Return the figures of one seed on the real sequences."""
    model, seconds = adapted(method, rate, train, seed)
    trained = sum(p.numel() for _, p in vl.trainable_parameters(model))
    if RECIPES[method] is not None:
        vl.eject(model, merge=True)
    return {
        "method": name,
        "trained": method,
        "seed": seed,
        "chosen_rate": rate,
        "trainable_parameters": trained,
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_seconds": round(seconds, 4),
        **scores(model, videos),
    }


def scores(model: LoRAT, videos: Sequence[Video]) -> dict[str, float]:
    """Return the AUC on the sequences by night, and as they are."""
    tracker = LoRATTracker(model)
    return {"night_auc": auc(ByNight(tracker), videos), "auc": auc(tracker, videos)}


def auc(tracker: Tracker, videos: Sequence[Video]) -> float:
    """Return the AUC of a tracker, in percent."""
    found = {}
    for run in track_all(tracker, videos):
        assert isinstance(run, Run)
        found[run.sequence.name] = Result((run.sequence.in_file(run.boxes),), run.seconds)
    return round(score_tracker(tracker.name, videos, found).mean.auc, 2)


def speed(video: Video) -> dict[str, float]:
    """Return the frames per second with adapters beside the weights, and in them."""
    image, box = read_image(video.frames[0]), video.boxes[0]
    model = build("tiny", weights=TINY_WEIGHTS)
    rates: dict[str, list[float]] = {"unmerged_fps": [], "merged_fps": []}
    for _ in range(5):
        rates["unmerged_fps"].append(frames_per_second(model, image, box))
        with vl.merged(model):
            rates["merged_fps"].append(frames_per_second(model, image, box))
    return {name: round(float(np.median(found)), 2) for name, found in rates.items()}


def frames_per_second(model: LoRAT, image: Frame, box: ArrayLike, frames: int = 20) -> float:
    """Time a tracker on one frame, again and again."""
    tracker = LoRATTracker(model)
    tracker.init(image, box)
    began = time.perf_counter()
    for _ in range(frames):
        tracker.track(image)
    return frames / (time.perf_counter() - began)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True, help="sequences in LaSOT's layout")
    parser.add_argument("--methods", nargs="+", choices=tuple(RATES), default=list(RATES))
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    check_json(options.json)
    return options


if __name__ == "__main__":
    run_cli(main)
