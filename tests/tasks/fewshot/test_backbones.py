"""Backbones by name: the right configuration, and quick clear errors without network."""

import socket
import time
import zipfile

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tasks.fewshot.backbones import ALIASES, load_backbone
from tasks.shared import weights
from visionlora.errors import ConfigError, DataError


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache and a proxy that nobody serves."""
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize("name", ["ViT-B/16", "ViT-B-32-quickgelu"])
def test_missing_weights_without_network_are_explained_within_ten_seconds(offline, name):
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_backbone(name, "openai")
    assert time.monotonic() - began < 10
    message = str(caught.value)
    assert "\n" not in message
    for way in ("--pretrained FILE", "cache", "--backbone tiny", "--pretrained none"):
        assert way in message


def test_a_silent_host_is_given_up(monkeypatch):
    monkeypatch.setattr(weights, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        problem = weights._unreachable(f"https://127.0.0.1:{server.getsockname()[1]}/weights")
        assert time.monotonic() - began < 5
    assert "127.0.0.1" in problem


@pytest.mark.parametrize(
    ("name", "tag", "config"),
    [
        ("ViT-B/16", "openai", "ViT-B-16-quickgelu"),
        ("ViT-B/32", "openai", "ViT-B-32-quickgelu"),
        ("ViT-L/14", "openai", "ViT-L-14-quickgelu"),
        ("ViT-L/14@336px", "openai", "ViT-L-14-336-quickgelu"),
        ("ViT-B/16", "laion2b_s34b_b88k", "ViT-B-16"),
        ("ViT-B-16", "laion2b_s34b_b88k", "ViT-B-16"),
        ("ViT-B-16-quickgelu", "openai", "ViT-B-16-quickgelu"),
    ],
)
def test_the_configuration_has_the_activation_of_the_weights(
    offline, monkeypatch, name, tag, config
):
    monkeypatch.setattr("tasks.fewshot.backbones.require_weights", lambda *args: None)
    with pytest.raises(ConfigError, match=f"no weights for {config} "):
        load_backbone(name, tag)


def test_a_download_of_openais_own_package_is_found(offline, tmp_path):
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    (tmp_path / ".cache" / "clip" / "ViT-B-16.pt").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"ViT-B-16\.pt does not hold weights"):
        load_backbone("ViT-B/16")


@pytest.mark.parametrize("alias", ALIASES.values(), ids=lambda alias: alias.name)
def test_aliases_name_the_same_weights_as_open_clip(alias):
    tag = open_clip.get_pretrained_cfg(alias.name, "openai")
    assert (tag["hf_hub"], tag["url"].rpartition("/")[2]) == (alias.hub, alias.file)
    assert f"{alias.name}-quickgelu" in open_clip.list_models()
    assert set(weights.DEFAULT_FILES) == {
        open_clip.constants.HF_SAFE_WEIGHTS_NAME,
        open_clip.constants.HF_WEIGHTS_NAME,
    }


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-16", "openai", "quick-GELU.*use --backbone ViT-B-16-quickgelu"),
        ("ViT-B/61", None, "did you mean 'ViT-B/16'"),
        ("RN50", None, "needs --pretrained"),
        ("ViT-B/16", "opnai", "did you mean 'openai'"),
        ("tiny", "openai", "carries its own weights"),
    ],
)
def test_wrong_names_and_weights_are_refused(name, pretrained, message):
    with pytest.raises(ConfigError, match=message):
        load_backbone(name, pretrained)


def test_a_file_of_something_else_is_refused(tmp_path, small_backbone):
    file = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(DataError, match="does not hold weights of ViT-test-small") as caught:
        load_backbone(small_backbone, str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_weights_file_is_loaded(tmp_path, small_backbone, kind):
    donor = load_backbone(small_backbone, "none")
    assert donor.random_weights
    state = {key: value + 1 for key, value in donor.clip.state_dict().items()}
    file = tmp_path / "weights"
    if kind == "safetensors":
        file = file.with_suffix(".safetensors")
        save_file(state, file)
    else:
        torch.save({"state_dict": state}, file)
    loaded = load_backbone(small_backbone, str(file))
    assert not loaded.random_weights
    assert all(torch.equal(value, state[key]) for key, value in loaded.clip.state_dict().items())


def test_an_archive_of_openai_is_known_by_its_form(tmp_path, small_backbone):
    file = tmp_path / "model.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/constants.pkl", b"")
    with pytest.raises(ConfigError, match="OpenAI archive, trained with quick-GELU"):
        load_backbone(small_backbone, str(file))


def test_random_weights_are_the_same_and_leave_the_global_stream_alone(small_backbone):
    state = torch.get_rng_state()
    first = load_backbone(small_backbone, "none").clip
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    second = load_backbone(small_backbone, "none").clip
    torch.set_rng_state(state)
    assert torch.equal(first.text_projection, second.text_projection)


def test_tiny_is_ready_offline(offline):
    backbone = load_backbone("tiny")
    assert backbone.transform.size == 16
    assert not backbone.random_weights
    assert not any(parameter.requires_grad for parameter in backbone.clip.parameters())
