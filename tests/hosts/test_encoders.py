"""Models around the layers: torch's encoder and its shortcuts, and CLIP's two towers."""

import copy
import itertools

import open_clip
import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close


@torch.no_grad()
def disturb(model):
    for _, item in vl.trainable_parameters(model):
        item.add_(0.3 * torch.randn_like(item))
    return model


TARGETS = [
    "layers.*.linear1",
    "layers.*.self_attn[q]",
    "layers.*.self_attn[out]",
    "layers.*.linear2",
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_inference_shortcut_does_not_bypass_an_adapter(target, padded):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2)
    model = copy.deepcopy(plain)
    disturb(vl.inject(model, "lora", targets=target, rank=2))
    x = torch.randn(2, 5, 8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = padded
    options = {"src_key_padding_mask": padding} if padded else {}
    seen = ~padding
    expected = model.train()(x, **options)
    with torch.no_grad():
        assert_close(model.eval()(x, **options)[seen], expected[seen])
        reference = plain.eval()(x, **options)
        assert not torch.allclose(reference[seen], expected[seen], atol=1e-3)
        with vl.merged(model):
            assert_close(model(x, **options)[seen], expected[seen])
        vl.eject(model)
        assert_close(model(x, **options)[seen], reference[seen])
        assert model.use_nested_tensor == plain.use_nested_tensor


def test_an_encoder_layer_alone_is_not_bypassed():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    disturb(vl.inject(model, "lora", targets="linear1", rank=2))
    x = torch.randn(2, 5, 8)
    expected = model(x)
    with torch.no_grad():
        assert_close(model.eval()(x), expected)


def clip():
    torch.manual_seed(2)
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"context_length": 7, "vocab_size": 30, "width": 24, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, quick_gelu=True)


IMAGES, TOKENS = (3, 3, 16, 16), (3, 7)


def features(model):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, generator=generator)
    tokens = torch.randint(1, 30, TOKENS, generator=generator)
    return model.encode_image(images), model.encode_text(tokens)


VISION = "visual.transformer.resblocks.*.attn"
TEXT = "transformer.resblocks.*.attn"


@pytest.mark.parametrize("slices", ["q", "k", "v", "out", "q,k,v,out"])
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_every_projection_of_a_clip_tower_acts_and_trains(tower, slices):
    model = clip().eval()
    image, text = features(model)
    pattern, exclude = (VISION, ()) if tower == "vision" else (TEXT, "visual.*")
    vl.inject(model, "lora", targets=f"{pattern}[{slices}]", exclude=exclude, rank=2)
    fresh_image, fresh_text = features(model)
    assert_close(fresh_image, image)
    assert_close(fresh_text, text)
    disturb(model)
    new_image, new_text = features(model)
    assert (torch.allclose(new_image, image, atol=1e-4)) == (tower == "text")
    assert (torch.allclose(new_text, text, atol=1e-4)) == (tower == "vision")
    (
        new_image.square().sum() + new_text.square().sum() + (new_image @ new_text.t()).sum()
    ).backward()
    trained = list(vl.trainable_parameters(model))
    assert len(trained) == 2 * 2 * len(slices.split(","))
    assert all(bool(item.grad.abs().sum() > 0) for _, item in trained)
    with vl.merged(model), torch.no_grad():
        for one, other in zip(features(model), (new_image, new_text), strict=True):
            assert_close(one, other)
    vl.eject(model)
    for one, other in zip(features(model), (image, text), strict=True):
        assert torch.equal(one, other)


def test_the_text_tower_stays_causal():
    model = clip().eval()
    disturb(vl.inject(model, "lora", targets=TEXT, exclude="visual.*", rank=2))
    one = torch.tensor([[5, 6, 29, 0, 0, 0, 0]])
    other = torch.tensor([[5, 6, 29, 9, 8, 7, 3]])
    assert_close(model.encode_text(one), model.encode_text(other))


def test_both_towers_and_their_mlp_save_and_load(tmp_path):
    model = clip().eval()
    targets = [VISION, TEXT, "mlp.c_fc", "mlp.c_proj", "token_embedding"]
    disturb(vl.inject(model, "lora", targets=targets, rank=2))
    fresh = vl.load(clip().eval(), vl.save(model, tmp_path / "clip.safetensors"))
    for one, other in itertools.zip_longest(features(fresh), features(model)):
        assert torch.equal(one, other)
