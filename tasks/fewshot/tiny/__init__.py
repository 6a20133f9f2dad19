"""A tiny CLIP that travels with the repository, so that every few-shot run works offline."""

from tasks.fewshot.tiny.model import (
    CHECKPOINT,
    build_tiny_clip,
    load_tiny_clip,
    prepare_images,
    tiny_tokenizer,
    tiny_transform,
)

__all__ = [
    "CHECKPOINT",
    "build_tiny_clip",
    "load_tiny_clip",
    "prepare_images",
    "tiny_tokenizer",
    "tiny_transform",
]
