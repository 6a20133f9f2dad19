"""Prompts cut at the longest end-of-text give the features of full prompts."""

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from tasks.fewshot.text import can_be_cut, encode_text, text_features, text_tower, tokenize
from tests.tolerances import assert_close
from visionlora.errors import ConfigError

VISION = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
CLASSES = ("cat", "a very long name of some strange animal", "red_fox")


def build(kind: type = open_clip.CLIP, **text) -> torch.nn.Module:
    """Return a small untrained model with a text tower of 77 tokens."""
    torch.manual_seed(0)
    options = {"width": 32, "heads": 2, "layers": 2, **text}
    return kind(32, VISION, CLIPTextCfg(**options)).eval()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (open_clip.CLIP, {}),
        (open_clip.CLIP, {"pool_type": "eos", "eos_id": 49407}),
        (open_clip.CustomTextCLIP, {"proj_bias": True}),
        (open_clip.CustomTextCLIP, {"proj_type": "none", "output_dim": 32}),
    ],
    ids=["argmax", "eos", "bias", "no-projection"],
)
def test_cut_prompts_equal_full_prompts(kind, text):
    text = {key: value for key, value in text.items() if key != "output_dim"}
    model = build(kind, **text)
    tokens = open_clip.SimpleTokenizer()([f"a photo of a {name}." for name in CLASSES])
    assert can_be_cut(text_tower(model))
    with torch.no_grad():
        torch.testing.assert_close(
            encode_text(model, tokens), model.encode_text(tokens), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("text", [{"no_causal_mask": True}, {"pool_type": "last"}])
def test_towers_that_see_the_padding_get_it_all(text):
    model = build(open_clip.CustomTextCLIP, **text)
    tokens = open_clip.SimpleTokenizer()([f"a photo of a {name}." for name in CLASSES])
    assert not can_be_cut(text_tower(model))
    with torch.no_grad():
        assert torch.equal(encode_text(model, tokens), model.encode_text(tokens))


def test_cutting_saves_the_padding():
    model = build()
    lengths = []
    model.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    encode_text(model, open_clip.SimpleTokenizer()(["a cat", "a dog"]))
    assert lengths == [4]


def test_several_templates_are_normalised_averaged_and_normalised():
    model = build()
    tokenizer = open_clip.SimpleTokenizer()
    both = tokenize(CLASSES, ["a {}.", "art of the {}."], tokenizer)
    assert both.shape == (2, 3, 77)
    with torch.no_grad():
        mean = sum(text_features(model, both[i : i + 1]) for i in range(2))
        expected = mean / mean.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(text_features(model, both), expected)


def test_underscores_are_spaces():
    tokenizer = open_clip.SimpleTokenizer()
    first, second = tokenize(["red_fox", "red fox"], ["a {}."], tokenizer)[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("template", ["a photo", "a {} {}"])
def test_templates_must_name_the_class_once(template):
    with pytest.raises(ConfigError, match="once"):
        tokenize(CLASSES, [template], open_clip.SimpleTokenizer())


@pytest.mark.parametrize("padding", [0, 49407], ids=["own padding", "padded with end-of-text"])
def test_a_prompt_that_would_be_cut_off_is_refused(padding):
    """A prompt of exactly the context is fine, one more token is not."""
    plain = open_clip.SimpleTokenizer(context_length=12)

    def tokenizer(texts, context_length=None):
        tokens = plain(texts, context_length)
        return tokens.masked_fill(tokens == 0, padding)

    fits = "cat " * 10  # with the tokens of start and end: 12
    assert tokenize(["dog", fits], ["{}"], tokenizer).shape == (1, 2, 12)
    with pytest.raises(
        ConfigError, match=r"prompt 'cat cat .* longer than the 12 tokens"
    ) as caught:
        tokenize(["dog", fits + "cat"], ["{}"], tokenizer)
    assert "\n" not in str(caught.value)


MANY = tuple(f"{size} {thing}" for size in ("small", "very large") for thing in ("cat", "dog"))


@pytest.mark.parametrize("chunk", [1, 3, 4, 9])
def test_chunks_of_prompts_give_the_same_gradient(chunk):
    model = build().double()
    tokens = tokenize(MANY, ["a {}.", "art of the {}."], open_clip.SimpleTokenizer())
    weights = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [p for name, p in model.named_parameters() if "attn" in name and "visual" not in name]
    gradients = [
        torch.autograd.grad((text_features(model, tokens, size) * weights).sum(), parts)
        for size in (None, chunk)
    ]
    for whole, chunked in zip(*gradients, strict=True):
        assert_close(chunked, whole)


def test_the_backward_of_a_chunk_draws_the_same_dropout_again():
    model = build().double().train()
    text_tower(model).transformer.resblocks[0].mlp.append(torch.nn.Dropout(0.5))
    tokens = tokenize(MANY, ["a {}."], open_clip.SimpleTokenizer())
    weight = model.transformer.resblocks[0].attn.in_proj_weight
    drawn = []
    model.transformer.resblocks[0].mlp.register_forward_hook(
        lambda _, args, y: drawn.append(y.detach())
    )
    text_features(model, tokens, 2).sum().backward()
    assert len(drawn) == 4
    found = {tuple(map(tuple, (y == 0).flatten(1).tolist())) for y in drawn}
    assert len(found) == 2  # two chunks, each with its own masks, twice
    assert weight.grad.isfinite().all()


def test_chunks_keep_little_for_the_backward():
    model = build()
    names = [f"thing {index}" for index in range(32)]
    tokens = tokenize(names, ["a {}."], open_clip.SimpleTokenizer())

    def kept(chunk: int | None) -> int:
        own = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
        found: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            text_features(model, tokens, chunk)
        return sum(found.values())

    assert kept(4) < 0.1 * kept(None)
