"""Class names to text features: prompts tokenised once and cut at the longest one.

CLIP pads every prompt to 77 tokens and reads the feature at the end-of-text token. Under a causal
mask no token sees what follows it, so cutting all prompts after the longest end-of-text changes
nothing and saves most of the text tower's work and memory.
"""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tasks.fewshot.templates import check_templates
from visionlora.errors import ConfigError


def tokenize(
    classes: Sequence[str], templates: Sequence[str], tokenizer: Callable[..., Tensor]
) -> Tensor:
    """Return tokens `[templates, classes, context]`; `_` in a class name is read as a space.

    Raises:
        ConfigError: a template without a place for the name, or a prompt that is too long.
    """
    check_templates(templates)
    names = [name.replace("_", " ") for name in classes]
    return torch.stack(
        [
            _tokens([template.replace("{}", name) for name in names], tokenizer)
            for template in templates
        ]
    )


def _tokens(prompts: list[str], tokenizer: Callable[..., Tensor]) -> Tensor:
    """Return tokens, and refuse a prompt that the tokeniser would cut off."""
    tokens = tokenizer(prompts)
    context = tokens.shape[1]
    padding = tokenizer([""])[0, -1]
    # The end-of-text token may be the padding too, so a cut prompt may end with one.
    full = [index for index, row in enumerate(tokens) if row[-2] != padding]
    if full:
        longer = tokenizer([prompts[index] for index in full], context_length=2 * context)
        for index, row in zip(full, longer, strict=True):
            count = int(row.ne(padding).sum())
            if count > int(tokens[index].ne(padding).sum()):
                raise ConfigError(
                    f"prompt {textwrap.shorten(prompts[index], 80)!r} is longer than the {context} "
                    "tokens that the text tower reads; shorten the class name or the template"
                )
    return tokens


def text_features(clip: Any, tokens: Tensor, chunk: int | None = None) -> Tensor:
    """Return one unit feature per class, `[classes, dim]`: the normalised mean over templates.

    Args:
        clip: An open_clip model.
        tokens: `[templates, classes, context]`.
        chunk: Encode so many prompts at a time, and again in the backward instead of keeping their
            activations: the same gradient, in memory that does not grow with the classes.
    """
    templates, classes, context = tokens.shape
    flat = tokens.reshape(templates * classes, context)
    if chunk is None:
        encoded = encode_text(clip, flat)
    else:
        encoded = torch.cat([_encoded_again(clip, part) for part in flat.split(chunk)])
    features = F.normalize(encoded, dim=-1)
    if templates == 1:
        return features
    return F.normalize(features.unflatten(0, (templates, classes)).mean(0), dim=-1)


def _encoded_again(clip: Any, tokens: Tensor) -> Tensor:
    """Return `encode_text(clip, tokens)`; its backward draws the same dropout again."""
    if not torch.is_grad_enabled():
        return encode_text(clip, tokens)
    features: Tensor = checkpoint(encode_text, clip, tokens, use_reentrant=False)
    return features


def encode_text(clip: Any, tokens: Tensor) -> Tensor:
    """Return what `clip.encode_text(tokens)` returns, on prompts cut at the longest end-of-text.

    Towers that are not causal, or do not read the end-of-text token, get the full length.
    """
    tower = text_tower(clip)
    if not can_be_cut(tower):
        features: Tensor = clip.encode_text(tokens)
        return features
    ends = _end_of_text(tower, tokens)
    length = int(ends.max()) + 1
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens[:, :length]).to(dtype) + tower.positional_embedding[
        :length
    ].to(dtype)
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    x = tower.ln_final(x)[torch.arange(len(x), device=x.device), ends]
    if isinstance(tower.text_projection, nn.Linear):
        return tower.text_projection(x)
    return x if tower.text_projection is None else x @ tower.text_projection


def text_tower(clip: nn.Module) -> Any:
    """Return the module that holds the text transformer: the model itself, or its `text`."""
    return getattr(clip, "text", clip)


def can_be_cut(tower: Any) -> bool:
    """Tell whether cutting is exact: causal mask, pooled at end-of-text, nothing appended."""
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False):
        return False
    return getattr(tower, "attn_mask", None) is not None and _pool(tower) in ("argmax", "eos")


def _pool(tower: Any) -> str:
    return str(getattr(tower, "text_pool_type", getattr(tower, "pool_type", "")))


def _end_of_text(tower: Any, tokens: Tensor) -> Tensor:
    """Return the position that each prompt is read at; end-of-text is the largest token."""
    if _pool(tower) == "argmax":
        return tokens.argmax(1)
    eos: int = getattr(tower, "text_eos_id", getattr(tower, "eos_id", -1))
    return tokens.eq(eos).int().argmax(1)
