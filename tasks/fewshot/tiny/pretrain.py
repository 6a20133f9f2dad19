"""Pretraining of the tiny CLIP on rendered characters with captions.

Each step compares a batch of glyphs with the captions of all 36 classes, written with one of seven
templates, and asks for the right caption: cross entropy over classes. Validation uses glyphs
rendered from another seed and nothing else; handwritten digits are never seen here.
"""

import json
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import cv2
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.fewshot.tiny.glyphs import CLASS_NAMES, GlyphSettings, render_glyphs
from tasks.fewshot.tiny.model import build_tiny_clip, save_tiny_clip, tiny_tokenizer
from visionlora.errors import ConfigError

TEMPLATES: Final = (
    "a photo of {}.",
    "a photo of a {}.",
    "a picture of {}.",
    "an image of {}.",
    "a drawing of {}.",
    "the character {}.",
    "{}.",
)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The recipe of the packaged checkpoint."""

    output: Path = Path("runs/fewshot/tiny/model.safetensors")
    """The checkpoint to write."""
    seed: int = 2
    """Seed of weights, glyphs and batches."""
    steps: int = 800
    """Optimiser steps."""
    images: int = 8_000
    """Rendered training glyphs."""
    validation_images: int = 1_800
    """Rendered validation glyphs, from another seed."""
    batch_size: int = 96
    """Glyphs per step."""
    lr: float = 1e-3
    """Peak learning rate of the one-cycle schedule."""
    warmup: float = 0.15
    """Share of steps during which the learning rate rises."""
    weight_decay: float = 0.02
    """Decoupled weight decay."""
    log_every: int = 50
    """Steps between two progress lines."""

    def __post_init__(self) -> None:
        for name in ("steps", "images", "validation_images", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def pretrain(config: PretrainConfig) -> float:
    """Train, write the checkpoint to `config.output`, return the glyph validation accuracy."""
    start = time.perf_counter()
    images, labels = render_glyphs(config.images, seed=2 * config.seed)
    print(f"rendered {config.images} glyphs in {time.perf_counter() - start:.1f} s", flush=True)
    model = _build_seeded(config.seed)
    prompts = _tokenize_prompts()
    _optimise(model, images, labels, prompts, config)
    seconds = time.perf_counter() - start

    held_out, truth = render_glyphs(config.validation_images, seed=2 * config.seed + 1)
    accuracy = glyph_accuracy(model, held_out, truth, prompts[0])
    recipe = {**asdict(config), "glyphs": asdict(GlyphSettings())}
    del recipe["output"]
    metadata = {
        "recipe": json.dumps(recipe),
        "versions": json.dumps(_versions()),
        "glyph_accuracy": f"{accuracy:.4f}",
        "seconds": f"{seconds:.1f}",
    }
    save_tiny_clip(model, config.output, prompts, metadata)
    print(f"glyph validation {accuracy:.1%}, {seconds:.0f} s, written to {config.output}")
    return accuracy


@torch.no_grad()
def glyph_accuracy(model: open_clip.CLIP, images: Tensor, labels: Tensor, prompts: Tensor) -> float:
    """Return the share of images whose nearest of the 36 captions is the right one."""
    model.eval()
    text = model.encode_text(prompts, normalize=True)
    scores = model.encode_image(images, normalize=True) @ text.T
    return float((scores.argmax(1) == labels).double().mean())


def _build_seeded(seed: int) -> open_clip.CLIP:
    # open_clip draws its weights from the global generator; give it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_tiny_clip()


def _versions() -> dict[str, str]:
    # OpenCV goes by several distribution names, and its version decides how glyphs look.
    others = ("numpy", "open_clip_torch", "pillow", "torch")
    return {"opencv": cv2.__version__, **{name: version(name) for name in others}}


def _tokenize_prompts() -> Tensor:
    tokenizer = tiny_tokenizer()
    return torch.stack([tokenizer([t.format(name) for name in CLASS_NAMES]) for t in TEMPLATES])


def _optimise(
    model: open_clip.CLIP, images: Tensor, labels: Tensor, prompts: Tensor, config: PretrainConfig
) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config.lr,
        total_steps=config.steps + 1,
        pct_start=config.warmup,
        cycle_momentum=False,
    )
    generator = torch.Generator().manual_seed(config.seed)
    start = time.perf_counter()
    model.train()
    for step in range(1, config.steps + 1):
        picked = torch.randint(len(images), (config.batch_size,), generator=generator)
        template = int(torch.randint(len(prompts), (), generator=generator))
        text = model.encode_text(prompts[template], normalize=True)
        features = model.encode_image(images[picked], normalize=True)
        scores = model.logit_scale.exp() * features @ text.T
        loss = F.cross_entropy(scores, labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            # Adaptation compares at a fixed scale of 100; pretraining must not pass it.
            model.logit_scale.clamp_(max=torch.log(torch.tensor(100.0)))
        if step % config.log_every == 0 or step == config.steps:
            hits = float((scores.argmax(1) == labels[picked]).float().mean())
            left = (time.perf_counter() - start) / step * (config.steps - step)
            print(
                f"step {step}/{config.steps}  loss {loss.item():.3f}  batch accuracy {hits:.0%}"
                f"  {left:.0f} s left",
                flush=True,
            )
