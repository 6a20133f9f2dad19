"""Contributions of a network to a task: measured, written, read back, and drawn."""

import json
from pathlib import Path

import cv2
import pytest
import torch

from tasks.restoration.contribution import (
    ContributionConfig,
    Probe,
    measure,
    read_scores,
    run,
)
from tasks.restoration.contribution_picture import COLOURS, NAMED, figure_of
from tasks.restoration.networks.catalogue import NETWORKS, Spec
from tasks.restoration.networks.files import Base, digest, load_base, save_base
from tasks.restoration.pairs.samples import Samples
from tasks.restoration.pairs.sources import load_source
from tasks.restoration.parameters import in_running_order, kind_of, means_by_kind, table_by_kind
from tests.tasks.restoration.pictures import write_pairs
from visionlora.errors import ConfigError, DataError

SPEC = Spec("nafnet", {"width": 4, "encoders": [1, 1], "middle": 1, "decoders": [1, 1]})
SHORT = {"probe_steps": 2, "points": 2, "images": 2, "patch": 16}


def network() -> torch.nn.Module:
    """Return a network whose blocks are at work."""
    torch.manual_seed(0)
    model = SPEC.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".beta", ".gamma")):
                parameter.normal_(0, 0.5)
    return model


def small_base() -> Base:
    model = network()
    return Base(model, SPEC, "small", digest(model.state_dict()), {})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("contribution")
    write_pairs(folder / "pairs")
    save_base(network(), SPEC, folder / "base.safetensors")
    return folder


def command(root: Path, **options) -> ContributionConfig:
    given = {"base": str(root / "base.safetensors"), "data": str(root / "pairs"), "device": "cpu"}
    return ContributionConfig(**{**given, **SHORT, **options})


def test_the_command_writes_scores_a_picture_and_a_table(root, capsys):
    out = root / "run"
    result = run(command(root, output=str(out)))
    base = load_base(root / "base.safetensors")
    said = json.loads((out / "scores.json").read_text())
    assert said["digest"] == base.digest
    assert set(said["scores"]) == {name for name, _ in base.model.named_parameters()}
    assert result["largest"] == max(said["scores"].values()) > 0
    layers = read_scores(out / "scores.json", base)
    assert layers["intro"] == said["scores"]["intro.weight"]
    picture = cv2.imread(str(out / "scores.png"))
    assert picture is not None
    assert picture.std() > 10
    printed = capsys.readouterr().out
    assert table_by_kind(said["scores"], base.model) in printed


@pytest.mark.parametrize("kind", ["faig", "grad", "magnitude"])
def test_measuring_leaves_the_base_as_it_is(root, kind):
    base = small_base()
    base.model.intro.weight.requires_grad_(False)
    samples = Samples(load_source(str(root / "pairs")), 16, 0)
    probe = Probe(kind, steps=2, batch_size=2, points=2, images=1)
    scores = measure(base, samples, probe)
    assert measure(base, samples, probe) == scores
    assert all(score >= 0 for score in scores.values())
    assert sum(score > 0 for score in scores.values()) >= 0.9 * len(
        scores
    )  # what is zero has no `grad`
    assert digest(base.model.state_dict()) == base.digest
    assert not base.model.intro.weight.requires_grad
    assert base.model.ending.weight.requires_grad
    assert base.model.ending.weight.grad is None


def test_a_network_whose_blocks_are_off_is_refused_before_anything_is_written(root):
    with pytest.raises(ConfigError, match="pre-train it first"):
        run(command(root, base="nafnet-tiny:random", output=str(root / "asleep")))
    assert not (root / "asleep").exists()


def test_scores_of_another_network_are_refused(root, tmp_path):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"scores": {"intro.weight": 1.0}}))
    with pytest.raises(ConfigError, match="another network"):
        read_scores(file, small_base())
    file.write_text("{")
    with pytest.raises(DataError, match="cannot read the scores"):
        read_scores(file, small_base())


@pytest.mark.parametrize("name", ["probe_steps", "points", "images", "patch"])
def test_lengths_are_at_least_one(name):
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        ContributionConfig(data="x", **{name: 0})


def test_parameters_are_ordered_as_a_picture_meets_them():
    order = in_running_order(network())
    assert sorted(order) == sorted(name for name, _ in network().named_parameters())
    wanted = [
        *("intro.weight", "encoders.0.0.conv1.weight", "downs.0.weight"),
        *("encoders.1.0.conv1.weight", "downs.1.weight", "middle_blks.0.conv5.weight"),
        *("ups.0.0.weight", "decoders.0.0.conv1.weight", "ups.1.0.weight", "ending.weight"),
    ]
    assert sorted(wanted, key=order.index) == wanted


def test_kinds_are_those_of_both_networks():
    nafnet = network()
    restormer = NETWORKS["restormer-tiny"].build()
    bias_free = Spec("restormer", {**NETWORKS["restormer-tiny"].arguments, "bias_free": True})
    for name, model, kind in (
        ("encoders.0.0.conv2.weight", nafnet, "conv"),
        ("ups.0.0.weight", nafnet, "conv"),
        ("encoders.0.0.sca.1.bias", nafnet, "bias"),
        ("encoders.0.0.norm1.weight", nafnet, "norm"),
        ("encoders.0.0.norm1.bias", nafnet, "norm"),
        ("encoders.0.0.beta", nafnet, "scale"),
        ("latent.0.attn.temperature", restormer, "scale"),
        ("latent.0.norm1.body.bias", restormer, "norm"),
        ("latent.0.norm1.body.weight", bias_free.build(), "norm"),
        ("0.weight", torch.nn.Sequential(torch.nn.Linear(3, 1)), "linear"),
    ):
        assert kind_of(name, model) == kind, name


def test_means_are_over_the_tensors_of_a_kind():
    model = network()
    scores = {name: 0.0 for name, _ in model.named_parameters()}
    scores |= {"intro.weight": 3.0, "intro.bias": 8.0}
    convs = [name for name in scores if kind_of(name, model) == "conv"]
    means = means_by_kind(scores, model)
    assert means["conv"] == 3.0 / len(convs)
    assert means["norm"] == 0.0
    assert next(iter(means)) == "bias"


def test_bars_are_the_scores_in_the_colours_of_the_parts():
    model = network()
    scores = {name: 1e-4 * (1 + i) for i, (name, _) in enumerate(model.named_parameters())}
    bars = figure_of(scores, model).axes[0]
    layers = [name for name in in_running_order(model) if kind_of(name, model) == "conv"]
    assert [bar.get_height() for bar in bars.patches] == [scores[name] for name in layers]
    assert [text.get_text() + ".weight" for text in bars.get_xticklabels()] == layers
    colours = [bar.get_facecolor() for bar in bars.patches]
    first, middle, last = (colours[at] for at in (0, len(colours) // 2, -1))
    assert len({first, middle, last}) == 3
    named = [text.get_text() for text in bars.get_legend().get_texts()]
    assert named == [part for part in COLOURS if part != "network"]


def test_of_many_layers_one_for_each_block_is_named():
    deep = {"width": 2, "encoders": [8, 8], "middle": 1, "decoders": [1, 1]}
    model = Spec("nafnet", deep).build()
    scores = {name: 1e-4 for name, _ in model.named_parameters()}
    names = [text.get_text() for text in figure_of(scores, model).axes[0].get_xticklabels()]
    assert len(figure_of(scores, model).axes[0].patches) > NAMED
    assert names[:3] == ["intro", "encoders.0.0", "encoders.0.1"]
    assert len(names) == len(set(names)) < 30
