"""The few-shot task of the generator: classes of a task, its vector, and a whole run."""

import json

import pytest
import torch
import torch.nn.functional as F

import visionlora as vl
from tasks.fewshot import generate
from tasks.fewshot.classifier import Classifier, adapter_targets
from tasks.fewshot.datasets import digits
from tasks.fewshot.images import Transform
from tasks.fewshot.task_vector import task_vector
from tasks.fewshot.text import tokenize
from tasks.fewshot.tiny import load_tiny_clip
from tests.tolerances import assert_close
from visionlora.errors import ConfigError, DataError
from visionlora.generate import Generator
from visionlora.io.adapter_file import read_adapter
from visionlora.training.cli import parse

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def model() -> Classifier:
    clip, tokenizer = load_tiny_clip()
    tokens = tokenize(["three", "eight"], ["a photo of {}."], tokenizer)
    return Classifier(clip.eval(), tokens, Transform(16, HALF, HALF), "both")


@pytest.fixture
def images() -> list[torch.Tensor]:
    return list(torch.randint(0, 256, (70, 3, 16, 16), dtype=torch.uint8))


def test_the_task_vector_is_mean_unit_image_feature_and_mean_unit_text_feature(model, images):
    pixels = torch.stack(images) / 127.5 - 1
    with torch.no_grad():
        image = F.normalize(model.clip.encode_image(pixels), dim=-1).mean(0)
        text = F.normalize(model.clip.encode_text(model.tokens[0]), dim=-1).mean(0)
    assert_close(task_vector(model, images), torch.cat([image, text]))
    assert_close(task_vector(model, images[::-1]), torch.cat([image, text]))


def test_the_task_vector_is_that_of_the_base_model(model, images):
    before = task_vector(model, images)
    targets, exclude = adapter_targets(model.clip, "both", ["q", "v"])
    vl.inject(model.clip, "lora", targets, exclude=exclude, rank=2, init="normal")
    try:
        vl.set_scale(model.clip, 100.0)
        assert_close(task_vector(model, images), before)
    finally:
        vl.eject(model.clip)


def test_a_task_vector_of_nothing_is_refused(model):
    with pytest.raises(DataError, match="at least one support image"):
        task_vector(model, [])


def test_a_task_names_a_data_set_and_classes():
    assert generate.classes_of("digits") == ("digits", None)
    assert generate.classes_of("digits@0-2,7") == ("digits", [0, 1, 2, 7])
    assert generate.classes_of("folder:a@b/c@3,1") == ("folder:a@b/c", [3, 1])


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("digits@", "does not end in classes"),
        ("digits@three", "does not end in classes"),
        ("digits@3", "at least two different classes"),
        ("digits@3,3", "at least two different classes"),
    ],
)
def test_a_task_with_wrong_classes_is_refused(task, words):
    with pytest.raises(ConfigError, match=words):
        generate.classes_of(task)


def test_some_classes_of_a_data_set_are_relabelled():
    whole = digits()
    part = generate.only_classes(whole, [7, 2])
    assert part.classes == ("seven", "two")
    for split in ("train", "test"):
        there = [item for item in getattr(whole, split) if item.label in (7, 2)]
        here = getattr(part, split)
        assert all(one.source is two.source for one, two in zip(here, there, strict=True))
        assert [[7, 2][item.label] for item in here] == [item.label for item in there]
    with pytest.raises(ConfigError, match="digits has classes 0-9, not 12"):
        generate.only_classes(whole, [3, 12])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "digits"], "at least two different tasks"),
        (["--tasks", "digits", "digits"], "at least two different tasks"),
        (["--generator.epoch", "3"], "did you mean '--generator.epochs'"),
        (["--generator.channels", "8", "1"], "channels"),
    ],
)
def test_wrong_options_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(generate.GenerateConfig, words)


def test_more_snapshots_than_steps_are_refused_before_the_run(tmp_path):
    config = generate.GenerateConfig(steps=4, output=str(tmp_path / "run"), test_on="val")
    with pytest.raises(ConfigError, match="every <= last <= steps"):
        generate.run(config)
    assert not (tmp_path / "run").exists()


def test_a_run_generates_adapters_from_other_pictures_than_it_trained_on(tmp_path):
    config = parse(
        generate.GenerateConfig,
        "--tasks digits@0,1 digits@2,3 --shots 2 --steps 3 --snapshot-steps 2 --snapshot-every 1 "
        "--generator.channels 4 8 --generator.latent 4 --generator.epochs 2 --device cpu "
        f"--test-on val --output {tmp_path / 'run'} --record {tmp_path / 'table.jsonl'}".split(),
    )
    result = generate.run(config)
    rows = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert rows == result["tasks"]
    assert [row["task"] for row in rows] == list(config.tasks)
    assert all(0 <= row[key] <= 100 for row in rows for key in ("zero_shot", "generated"))
    seed = tmp_path / "run" / "seed_1"
    generator = Generator.load(seed / "generator.safetensors")
    assert generator.tasks == ("digits@0,1", "digits@2,3")
    made = read_adapter(seed / "task_0" / "generated.safetensors")
    assert made.plan == read_adapter(seed / "task_0" / "snapshots/step_000003.safetensors").plan
    seen, other = generate._supports(config, generate._task(config, config.tasks[0]), 1)
    there = {image.numpy().tobytes() for image in seen.images}
    assert len(seen.images) == len(other.images) == 4
    assert not any(image.numpy().tobytes() in there for image in other.images)
