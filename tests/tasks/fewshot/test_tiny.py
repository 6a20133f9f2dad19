"""Laws of the packaged tiny CLIP, of its pictures and of its pretraining."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("open_clip")
pytest.importorskip("cv2")

from tasks.fewshot.tiny import (
    CHECKPOINT,
    build_tiny_clip,
    load_tiny_clip,
    prepare_images,
    tiny_transform,
)
from tasks.fewshot.tiny.glyphs import (
    CHARACTERS,
    CLASS_NAMES,
    DIGIT_NAMES,
    GlyphSettings,
    render_glyphs,
)
from tasks.fewshot.tiny.model import fingerprint
from tasks.fewshot.tiny.pretrain import TEMPLATES, PretrainConfig, pretrain
from visionlora.errors import AdapterFileError, ConfigError


def embed_prompts() -> Tensor:
    model, tokenizer = load_tiny_clip()
    return model.encode_text(tokenizer([f"a photo of {name}." for name in DIGIT_NAMES]))


def test_packaged_checkpoint_is_small_and_says_how_it_was_made() -> None:
    assert CHECKPOINT.stat().st_size < 1_500_000
    with safe_open(CHECKPOINT, framework="pt") as file:
        assert {"recipe", "versions", "glyph_accuracy", "fingerprint"} <= file.metadata().keys()


def test_loading_reproduces_the_stored_fingerprint() -> None:
    model, _ = load_tiny_clip()
    stored = load_file(CHECKPOINT)
    with safe_open(CHECKPOINT, framework="pt") as file:
        assert fingerprint(stored) == file.metadata()["fingerprint"]
    loaded = model.state_dict()
    trained = {key: value for key, value in stored.items() if not key.startswith("used_tokens")}
    assert loaded.keys() - trained.keys() == {"token_embedding.weight"}
    for key, value in trained.items():
        assert torch.equal(loaded[key], value.float()), key


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    with safe_open(CHECKPOINT, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(CHECKPOINT)
    tensors["visual.proj"][0, 0] += 1
    save_file(tensors, tmp_path / "changed.safetensors", metadata)
    with pytest.raises(AdapterFileError, match="damaged"):
        load_tiny_clip(tmp_path / "changed.safetensors")
    (tmp_path / "short.safetensors").write_bytes(CHECKPOINT.read_bytes()[:1000])
    for name in ("short.safetensors", "absent.safetensors"):
        with pytest.raises(AdapterFileError, match="cannot read"):
            load_tiny_clip(tmp_path / name)


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(AdapterFileError, match="is not a tiny CLIP"):
        load_tiny_clip(tmp_path / "foreign.safetensors")


def test_stored_embedding_rows_agree_with_the_redrawn_ones() -> None:
    stored = load_file(CHECKPOINT)
    redrawn = build_tiny_clip().token_embedding.weight[stored["used_tokens.ids"].long()]
    torch.testing.assert_close(stored["used_tokens.rows"], redrawn, atol=1e-5, rtol=0)


def test_embedding_does_not_depend_on_the_global_seed_and_is_frozen() -> None:
    first, second = build_tiny_clip(), build_tiny_clip()
    assert torch.equal(first.token_embedding.weight, second.token_embedding.weight)
    assert not torch.equal(first.visual.proj, second.visual.proj)
    frozen = [name for name, p in first.named_parameters() if not p.requires_grad]
    assert frozen == ["token_embedding.weight"]
    assert sum(p.numel() for p in first.parameters() if p.requires_grad) == 313_729


def test_prompts_fit_the_context_and_are_told_apart() -> None:
    _, tokenizer = load_tiny_clip()
    tokens = tokenizer([t.format(name) for t in TEMPLATES for name in CLASS_NAMES])
    assert tokens.shape == (len(TEMPLATES) * 36, 16)
    assert (tokens.max(dim=1).values == 49_407).all()  # the end token was not cut off
    assert len(tokens.unique(dim=0)) == len(tokens)
    assert torch.pdist(embed_prompts()).min() > 0.1


def test_36_classes() -> None:
    assert len(CHARACTERS) == len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 36
    assert CLASS_NAMES[0] == "zero"
    assert CLASS_NAMES[-1] == "letter Z"


def test_rendering_is_a_pure_function_of_the_seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    images, labels = render_glyphs(72, seed=3)
    again, _ = render_glyphs(72, seed=3)
    other, _ = render_glyphs(72, seed=4)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert images.shape == (72, 3, 16, 16)
    assert images.min() >= -1
    assert images.max() <= 1
    assert torch.equal(labels.bincount(), torch.full((36,), 2))


def test_every_glyph_shows_ink() -> None:
    thinned = GlyphSettings(thinnest=-20, thickest=-20, noise=0.0)
    images, _ = render_glyphs(108, seed=0, settings=thinned)
    assert (images.amax(dim=(1, 2, 3)) > -0.5).all()


def test_transform_takes_any_picture_and_agrees_with_the_batch_path() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (40, 24), dtype=np.uint8)
    colour = np.stack([grey] * 3, axis=2)
    expected = prepare_images(torch.from_numpy(grey)[None, None])[0]
    for image in (grey, colour, Image.fromarray(grey), Image.fromarray(colour)):
        torch.testing.assert_close(tiny_transform(image), expected)
    assert expected.shape == (3, 16, 16)
    white = torch.ones(2, 1, 8, 8)
    torch.testing.assert_close(prepare_images(white), torch.ones(2, 3, 16, 16))
    torch.testing.assert_close(prepare_images(white - 1), -torch.ones(2, 3, 16, 16))


def test_pretraining_runs_end_to_end_and_its_checkpoint_loads(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    config = PretrainConfig(
        output=tmp_path / "tiny.safetensors", steps=3, images=72, validation_images=36, batch_size=8
    )
    accuracy = pretrain(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert 0 <= accuracy <= 1
    model, _ = load_tiny_clip(config.output)
    packaged, _ = load_tiny_clip()
    assert torch.equal(model.token_embedding.weight, packaged.token_embedding.weight)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not torch.equal(model.visual.proj, packaged.visual.proj)


def test_pretraining_refuses_empty_runs() -> None:
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        PretrainConfig(steps=0)


def test_zero_shot_reads_handwritten_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images[-899:]).float()[:, None] / 16
    model, _ = load_tiny_clip()
    with torch.no_grad():
        features = model.encode_image(prepare_images(images), normalize=True)
        scores = features @ torch.nn.functional.normalize(embed_prompts(), dim=1).T
    hits = scores.argmax(1).numpy() == digits.target[-899:]
    assert hits.mean() >= 0.5
