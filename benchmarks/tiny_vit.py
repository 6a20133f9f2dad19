"""The embedded backbone beside its teacher: linear probes on photographs of clothes.

python benchmarks/tiny_vit.py --data PATH/clothing10 [--weights FILE]      some minutes on one core
python benchmarks/tiny_vit.py --table                                      from what was measured

Frozen features at 128 pixels, averaged over the picture: those of tiny-vit, of EfficientNet-Lite0
up to stride 16 (what tiny-vit was taught) and of the whole EfficientNet-Lite0. The probe, its
penalty chosen on validation images, and the seeds are those of benchmarks/clothing10.py; no network
has seen these photographs.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks import clothing10
from benchmarks.lines import each, read
from tasks.fewshot.backbones import Backbone, load_backbone
from tasks.fewshot.datasets import load_dataset
from tasks.fewshot.images import Transform
from tasks.fewshot.vision_only import PREFIX, VisionModel
from tasks.shared.tiny_vit.model import NAME
from tasks.shared.tiny_vit.teacher import CHANNELS, Teacher
from visionlora.errors import ConfigError
from visionlora.training.cli import run_cli

RESULTS = Path(__file__).parent / "results" / "tiny_vit.jsonl"
SHOTS = (1, 4, 16)
STUDENT, RANDOM, TAUGHT, WHOLE = "tiny-vit", "tiny-vit, random", "lite0 to stride 16", "lite0"
BACKBONES = (STUDENT, TAUGHT, WHOLE, RANDOM)


def main(argv: list[str] | None = None) -> None:
    """Measure the rows that are missing, and print the table."""
    options = parse_arguments(argv)
    if not options.table:
        if options.data is None:
            raise ConfigError("--data: where are the photographs? The folder with train, val, test")
        torch.set_num_threads(options.threads)
        dataset = load_dataset(f"folder:{options.data}")
        benches: dict[str, clothing10.Bench] = {}

        def measure(row: str) -> dict[str, Any]:
            name, _, shots = row.rpartition(" ")
            if name not in benches:
                benches[name] = clothing10.Bench(dataset, backbone(name, options.weights))
            model: Any = benches[name].backbone.clip
            figures = benches[name].probe(int(shots))
            return {"method": row, "width": model.width, "shots": int(shots), **figures}

        each([f"{name} {n}" for name in BACKBONES for n in SHOTS], options.json, measure)
    print(table(list(read(options.json))))


def backbone(name: str, weights: Path | None) -> Backbone:
    """Return one of the networks."""
    if name == TAUGHT:
        model = VisionModel(Pooled(Teacher()), CHANNELS).eval().requires_grad_(False)
        plain = Transform(clothing10.SIZE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return Backbone(f"{PREFIX}{NAME}", "none", model, _no_text, plain)
    if name == WHOLE:
        return load_backbone(clothing10.BACKBONE, clothing10.WEIGHTS, clothing10.SIZE)
    chosen = "none" if name == RANDOM else None if weights is None else str(weights)
    return load_backbone(f"{PREFIX}{NAME}", chosen, clothing10.SIZE)


class Pooled(nn.Module):
    """Dense features, averaged."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """Return one feature vector per picture."""
        features: Tensor = self.dense(pixels)
        return features.mean(1)


def table(rows: list[dict[str, Any]]) -> str:
    """Return accuracy by shots, as Markdown."""
    found = {row["method"]: row for row in rows}
    heading = " | ".join(f"{n} shots" for n in SHOTS)
    lines = [f"| frozen features | width | {heading} |", "|---" * (len(SHOTS) + 2) + "|"]
    for name in BACKBONES:
        own = [found.get(f"{name} {n}") for n in SHOTS]
        width = next((row["width"] for row in own if row), "")
        cells = ["" if row is None else f"{row['accuracy']:.1f} ± {row['std']:.1f}" for row in own]
        lines.append(f"| {name} | {width} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, help="folder with train, val and test")
    parser.add_argument("--weights", type=Path, help="file of tiny-vit instead of what ships")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the lines go")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--table", action="store_true", help="only print the table")
    return parser.parse_args(argv)


def _no_text(prompts: list[str]) -> Tensor:
    raise ConfigError("these features have no text tower")


if __name__ == "__main__":
    run_cli(main)
