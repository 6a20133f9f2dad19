"""Small relatives of the CLIP models people use: built, adapted, trained, saved, merged."""

import json
from collections.abc import Iterator

import open_clip
import pytest
import torch
from torch import nn

import visionlora as vl
from tasks.fewshot import train
from tasks.fewshot.backbones import load_backbone
from tasks.fewshot.classifier import Classifier, adapter_targets, default_params
from tasks.fewshot.config import FewshotConfig
from tasks.fewshot.text import encode_text, text_tower, tokenize
from visionlora.errors import ConfigError

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"
    },
    "text_cfg": {
        **TEXT, "context_length": 64, "no_causal_mask": True, "proj_bias": True,
        "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    },
}  # fmt: skip
EVA = {
    "embed_dim": 32,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 224, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token",
        "timm_proj": None,
    },
    "text_cfg": TEXT,
}  # fmt: skip
MOBILE = {
    "embed_dim": 32,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 64, "timm_model_name": "fastvit_mci0", "timm_pool": "avg", "timm_proj": None
    },
    "text_cfg": {**TEXT, "no_causal_mask": True},
}  # fmt: skip
CONVNEXT = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "avg",
        "timm_proj": "linear",
    },
    "text_cfg": TEXT,
}  # fmt: skip
RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
    "text_cfg": TEXT,
}
MODELS = {"sigmoid": SIGLIP, "eva": EVA, "mobile": MOBILE, "convnext": CONVNEXT, "resnet": RESNET}


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory) -> Iterator[None]:
    """Register the models in open_clip as `test-NAME`."""
    folder = tmp_path_factory.mktemp("open_clip")
    for name, config in MODELS.items():
        (folder / f"test-{name}.json").write_text(json.dumps(config))
    known = open_clip.factory._MODEL_CONFIGS
    before = dict(known)
    open_clip.add_model_config(folder)
    yield
    known.clear()
    known.update(before)


@pytest.fixture(scope="module")
def backbones():
    """Return `get(name)`: each model is built once."""
    built = {}

    def get(name: str):
        if name not in built:
            built[name] = load_backbone(f"test-{name}", "none")
        return built[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_every_adapter_of_both_towers_learns_and_merges(backbones, name):
    backbone = backbones(name)
    clip = backbone.clip
    params = default_params(clip, "both")
    targets, exclude = adapter_targets(clip, "both", params)
    # In a convolutional tower `conv` has no layer in the text tower, which gets q, k and v.
    vl.inject(clip, "lora", targets, exclude=exclude, rank=2)
    tokens = tokenize(("one", "two", "three"), ["a photo of {}."], backbone.tokenizer)
    model = Classifier(clip, tokens, backbone.transform, "both")
    size = backbone.transform.size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (3, 3, size, size), dtype=torch.uint8, generator=generator)
    statistics = {key: value.clone() for key, value in clip.named_buffers() if "running" in key}
    optimizer = torch.optim.SGD([item for _, item in vl.trainable_parameters(clip)], lr=0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(3)).backward()
        optimizer.step()
    grads = {key: item.grad for key, item in vl.trainable_parameters(clip)}
    assert any(key.startswith("visual.") for key in grads)
    assert any(not key.startswith("visual.") for key in grads) == ("q" in params)
    assert [key for key, grad in grads.items() if grad is None] == []
    assert all(torch.equal(value, clip.get_buffer(key)) for key, value in statistics.items())
    model.eval()
    with torch.no_grad():
        expected = model(images)
        with vl.merged(clip):
            torch.testing.assert_close(model(images), expected, atol=2e-3, rtol=1e-3)
    vl.eject(clip)


@pytest.mark.parametrize("name", MODELS)
def test_text_features_are_those_of_open_clip(backbones, name):
    backbone = backbones(name)
    tokens = tokenize(("one", "a much longer name"), ["a photo of {}."], backbone.tokenizer)[0]
    assert tokens.shape[1] == (64 if name == "sigmoid" else 77)
    with torch.no_grad():
        torch.testing.assert_close(
            encode_text(backbone.clip, tokens),
            backbone.clip.encode_text(tokens),
            atol=1e-5,
            rtol=1e-4,
        )


def test_a_constant_bias_of_the_sigmoid_loss_changes_no_probability(backbones):
    clip = backbones("sigmoid").clip
    assert float(clip.logit_bias) == -10
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close((logits + clip.logit_bias).softmax(-1), logits.softmax(-1))


def test_a_text_tower_of_another_make_is_refused_in_one_line(backbones):
    clip = backbones("sigmoid").clip
    tower = text_tower(clip)
    clip.text = nn.Linear(2, 2)
    try:
        with pytest.raises(ConfigError, match="not open_clip's; use --encoder vision") as caught:
            adapter_targets(clip, "both", ["q"])
        assert adapter_targets(clip, "vision", ["q"])[0]
    finally:
        clip.text = tower
    assert "\n" not in str(caught.value)


def test_a_tokeniser_that_cannot_be_had_is_said_before_the_model_is_built(monkeypatch):
    def unreachable(name):
        raise OSError("We couldn't connect\nto the host")

    monkeypatch.setattr(open_clip, "get_tokenizer", unreachable)
    monkeypatch.setattr(open_clip, "create_model", None)
    with pytest.raises(ConfigError, match="no tokeniser for test-convnext") as caught:
        load_backbone("test-convnext", "none")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_run_of_two_steps(tmp_path, name):
    # EVA's attention reads the weight of its fused projection itself.
    adapter = {"dropout": 0.0} if name == "eva" else {}
    config = FewshotConfig(
        adapter=adapter,
        backbone=f"test-{name}",
        pretrained="none",
        shots=1,
        steps=2,
        batch_size=4,
        limit_test=8,
        checkpoint_every=0,
        baselines=["linear-probe", "tip-adapter"],
        output=str(tmp_path / "run"),
    )
    result = train.run(config)
    assert result["random_weights"]
    assert set(result["baselines"]) == {"linear-probe", "tip-adapter"}
    assert 0 <= result["ece"] <= 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ViT-B-16-SigLIP", "EVA02-B-16", "MobileCLIP-B", "MobileCLIP2-S0", "RN50"]
)
def test_the_models_themselves_have_layers_to_adapt(name):
    clip = open_clip.create_model(name, load_weights=False, device="meta")
    targets, _ = adapter_targets(clip, "both", default_params(clip, "both"))
    assert vl.targets.find_targets(clip, targets)
