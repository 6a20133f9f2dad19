"""The transcription of CLIP-LoRA's recipe is our mathematics, and both sides are measured."""

import copy
import json

import pytest
import torch

import visionlora as vl
from benchmarks import fewshot_speed
from benchmarks.fewshot_speed import Row, Setting, class_names, main, markdown, memory, times
from benchmarks.reference_recipe import ReferenceLinear, ReferenceRecipe, adapt_reference
from tasks.fewshot.backbones import load_backbone
from tasks.fewshot.classifier import Classifier, adapter_targets
from tasks.fewshot.text import tokenize
from tests.tolerances import assert_close
from visionlora.errors import ConfigError, OutputError

OPTIONS = {"rank": 2, "alpha": 1.0, "dropout": 0.0}
NAMES = ("one", "two", "a rather long name")
TEMPLATE = "a photo of {}."


@pytest.fixture
def sides():
    """The same changes on both sides, in float64: our classifier, and the reference's recipe."""
    backbone = load_backbone("tiny")
    clip = backbone.clip.double()
    other = copy.deepcopy(clip)
    targets, exclude = adapter_targets(clip, "both", ["q", "k", "v"])
    vl.inject(clip, "lora", targets, exclude=exclude, scaling="rslora", **OPTIONS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in vl.trainable_parameters(clip):
            parameter.normal_(std=0.1, generator=generator)
    adapt_reference(other, **OPTIONS)
    other.double()
    with torch.no_grad():
        for parameter, value in zip(trained(other).values(), trained(clip).values(), strict=True):
            parameter.copy_(value)
    tokens = tokenize(NAMES, [TEMPLATE], backbone.tokenizer)
    ours = Classifier(clip, tokens, backbone.transform, "both").double().train()
    recipe = ReferenceRecipe(other.train(), backbone.tokenizer, NAMES, TEMPLATE, steps=10)
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return ours, recipe, images, (images.double() / 255 - ours.mean) / ours.std


def trained(clip) -> dict[str, torch.Tensor]:
    """Return the factors of both sides under one name each, such as `visual...0.attn.q.A`."""
    named = clip.named_parameters()
    found = {n.replace("adapters.default.", ""): p for n, p in named if p.requires_grad}
    return dict(sorted(found.items()))


def test_both_sides_train_the_same_tensors(sides):
    ours, recipe, *_ = sides
    shapes = [
        {name: value.shape for name, value in trained(clip).items()}
        for clip in (ours.clip, recipe.clip)
    ]
    assert shapes[0] == shapes[1]


def test_without_dropout_loss_and_gradients_are_the_same(sides):
    ours, recipe, images, pixels = sides
    labels = torch.tensor([0, 1, 2, 1, 0])
    losses = [
        torch.nn.functional.cross_entropy(logits, labels)
        for logits in (ours(images), recipe.logits(pixels))
    ]
    assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    expected = trained(recipe.clip)
    assert all(value.grad.abs().max() > 0 for value in expected.values())
    for name, value in trained(ours.clip).items():
        assert_close(value.grad, expected[name].grad)


def test_merged_evaluations_are_the_same_and_the_reference_goes_back_to_its_weights(sides):
    ours, recipe, images, pixels = sides
    before = copy.deepcopy(recipe.clip.state_dict())
    with torch.no_grad(), vl.merged(ours.clip):
        assert_close(ours.eval()(images), recipe.evaluate(pixels))
    for name, value in recipe.clip.state_dict().items():
        assert_close(value, before[name])


def test_with_dropout_the_expected_change_is_the_dense_one():
    torch.default_generator.manual_seed(0)
    layer = ReferenceLinear(torch.zeros(3, 4), torch.zeros(3), rank=2, alpha=1.0, dropout=0.5)
    with torch.no_grad():
        layer.B.normal_()
        x = torch.randn(4)
        mean = layer(x.expand(40_000, 4)).mean(0)
        assert (mean - layer.scale * layer.B @ layer.A @ x).abs().max() < 0.05
        assert torch.equal(layer.eval()(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_a_step_lowers_the_loss_of_either_side():
    setting = Setting("tiny", batch=4, classes=3, threads=torch.get_num_threads())
    for name in ("ours", "reference"):
        side = fewshot_speed.Side(name, setting)
        first, *_, last = [side.step() for _ in range(30)]
        assert last < first
        assert side.evaluate().shape == (4, 3)


def test_times_are_ratios_of_the_reference_to_ours():
    setting = Setting("tiny", batch=2, classes=3, threads=torch.get_num_threads())
    rows = times(setting, rounds=1, minutes=1)
    assert [row.what for row in rows] == ["step", "evaluation"]
    assert all(row.ratio == pytest.approx(row.reference / row.ours) for row in rows)


@pytest.mark.slow
def test_memory_is_that_of_processes_of_their_own():
    row = memory(Setting("tiny", batch=2, classes=3, threads=1))
    assert row.ours > 100
    assert row.ratio == pytest.approx(row.reference / row.ours)


def test_lines_hold_rows_and_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fewshot_speed, "memory", lambda setting: Row("memory", 300, 100, 3, 1))
    file = tmp_path / "speed.jsonl"
    threads = str(torch.get_num_threads())
    words = ["--backbone", "tiny", "--batch", "2", "--classes", "3", "--rounds", "1"]
    main([*words, "--threads", threads, "--json", str(file)])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["what"] for line in lines] == ["memory", "step", "evaluation"]
    assert all((line["batch"], line["classes"], line["rank"]) == (2, 3, 2) for line in lines)
    assert "300 MB" in capsys.readouterr().out
    assert "| peak memory of training | 300 MB | 100 MB | 3.00 | 1.43 |" in markdown(file)


def test_names_differ_and_impossible_requests_are_refused(tmp_path):
    assert all(len(set(class_names(count))) == count for count in (2, 3, 26, 100))
    for words, error in (
        (["--classes", "101"], ConfigError),
        (["--batch", "0"], ConfigError),
        (["--json", str(tmp_path / "none" / "x.jsonl")], OutputError),
    ):
        with pytest.raises(error):
            main(words)
