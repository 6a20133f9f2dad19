"""The classifier adapts the towers and projections that were asked for, and only these."""

import pytest
import torch

import visionlora as vl
from tasks.fewshot.backbones import load_backbone
from tasks.fewshot.classifier import Classifier, adapter_targets
from tasks.fewshot.config import FewshotConfig
from tasks.fewshot.recipe import PRESETS, rate_of
from tasks.fewshot.text import tokenize
from visionlora.errors import ConfigError


@pytest.fixture
def backbone():
    return load_backbone("tiny")


def build(backbone, encoder="both", params=("q", "k", "v"), **options) -> Classifier:
    """Inject an adapter and return the classifier over three classes."""
    options = {"rank": 2, **options} if "method" not in options else options
    options = {"method": "lora", **options}
    kinds = vl.get_method(options["method"]).config.kinds
    targets, exclude = adapter_targets(backbone.clip, encoder, params, kinds)
    vl.inject(backbone.clip, targets=targets, exclude=exclude, **options)
    tokens = tokenize(("one", "two", "three"), ["a photo of {}."], backbone.tokenizer)
    return Classifier(backbone.clip, tokens, backbone.transform, encoder)


def trained(backbone) -> dict[str, int]:
    """Return the trainable tensors and their sizes."""
    return {name: p.numel() for name, p in vl.trainable_parameters(backbone.clip)}


@pytest.mark.parametrize(("encoder", "layers"), [("vision", 4), ("text", 2), ("both", 6)])
def test_adapters_are_in_the_chosen_towers(backbone, encoder, layers):
    build(backbone, encoder)
    names = trained(backbone)
    assert any(name.startswith("visual.") for name in names) == (encoder != "text")
    assert any(not name.startswith("visual.") for name in names) == (encoder != "vision")
    assert sum(names.values()) == layers * 3 * 2 * (64 + 64)


@pytest.mark.parametrize(
    ("blocks", "rank", "layout"), [(2, 2, "rank"), (4, 4, "rank"), (8, 2, "grid")]
)
def test_block_lora_counts_follow_the_formula(backbone, blocks, rank, layout):
    build(backbone, method="block-lora", rank=rank, blocks=blocks, layout=layout)
    assert sum(trained(backbone).values()) == 6 * 3 * (rank * 64 // blocks + rank * 64)


@pytest.mark.parametrize("params", [("out",), ("o",), ("q", "out"), ("mlp",)])
def test_every_chosen_projection_is_trained(backbone, params):
    model = build(backbone, params=params)
    optimizer = torch.optim.SGD([p for _, p in vl.trainable_parameters(backbone.clip)], lr=0.1)
    images = torch.randint(0, 255, (6, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2] * 2)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    grads = {name: p.grad for name, p in vl.trainable_parameters(backbone.clip)}
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def test_untrained_adapters_change_no_logit(backbone):
    images = torch.randint(0, 255, (5, 3, 16, 16), dtype=torch.uint8)
    model = build(backbone).eval()
    with torch.no_grad():
        adapted = model(images)
        vl.eject(backbone.clip)
        torch.testing.assert_close(adapted, model(images), atol=1e-4, rtol=1e-5)


def test_logits_are_a_hundred_cosines(backbone):
    model = build(backbone).eval()
    with torch.no_grad():
        logits = model(torch.randint(0, 255, (5, 3, 16, 16), dtype=torch.uint8))
    assert logits.abs().max() <= 100.001


def test_cached_text_features_equal_computed_ones(backbone):
    images = torch.randint(0, 255, (5, 3, 16, 16), dtype=torch.uint8)
    model = build(backbone, "vision").eval()
    with torch.no_grad():
        expected = model(images)
        model.cache_text()
        assert torch.equal(model(images), expected)
        assert torch.equal(model(model.image_features(images)), expected)


@pytest.mark.parametrize(
    ("params", "message"), [(["qkv"], "unknown --params"), ([], "at least one")]
)
def test_unknown_projections_are_refused(backbone, params, message):
    with pytest.raises(ConfigError, match=message):
        adapter_targets(backbone.clip, "both", params)


def test_towers_without_attention_are_refused(backbone):
    backbone.clip.visual = torch.nn.Identity()
    with pytest.raises(ConfigError, match="--encoder text"):
        adapter_targets(backbone.clip, "both", ["q"])


@pytest.mark.slow
@pytest.mark.parametrize("method", vl.list_methods())
def test_every_registered_method_lowers_the_loss(backbone, method):
    config = FewshotConfig(method=method)
    model = build(backbone, method=method, **config.adapter_options(1))
    lr = PRESETS["tiny"].lr * rate_of(method)
    optimizer = torch.optim.AdamW(vl.parameter_groups(backbone.clip, lr, weight_decay=0.0))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (6, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([0, 1, 2] * 2)

    def loss(training: bool) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model.train(training)(images), labels)

    before = loss(False).item()
    for _ in range(10):
        optimizer.zero_grad()
        loss(True).backward()
        optimizer.step()
    assert loss(False).item() < before
