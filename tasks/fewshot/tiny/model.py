"""The tiny CLIP: an ordinary `open_clip.CLIP`, small enough to travel inside the repository.

Sixteen-pixel images in patches of four, a vision tower of 4 blocks and a text tower of 2 blocks,
both 64 wide: 313,729 trained numbers. The token embedding (49,408 x 64) would outweigh everything
else, so it is frozen random noise, drawn again from a fixed seed when the model is built; only
the rows of words that pretraining has used are stored, because only these must be exact on every
machine.
"""

import functools
import hashlib
from pathlib import Path
from typing import Final

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.io.atomic import write_atomically

CHECKPOINT: Final = Path(__file__).with_name("model.safetensors")
IMAGE_SIZE: Final = 16
CONTEXT_LENGTH: Final = 16
VOCABULARY: Final = 49_408
WIDTH: Final = 64

_EMBEDDING_KEY: Final = "token_embedding.weight"
_EMBEDDING_SEED: Final = 20_250
_EMBEDDING_STD: Final = 0.3
_USED_IDS: Final = "used_tokens.ids"
_USED_ROWS: Final = "used_tokens.rows"


def build_tiny_clip() -> open_clip.CLIP:
    """Build the model with freshly drawn weights and its fixed, frozen token embedding."""
    model = open_clip.CLIP(
        embed_dim=WIDTH,
        vision_cfg=CLIPVisionCfg(
            layers=4, width=WIDTH, head_width=16, patch_size=4, image_size=IMAGE_SIZE
        ),
        text_cfg=CLIPTextCfg(
            context_length=CONTEXT_LENGTH, vocab_size=VOCABULARY, width=WIDTH, heads=4, layers=2
        ),
        quick_gelu=True,
    )
    with torch.no_grad():
        model.token_embedding.weight.copy_(_draw_token_embedding())
    model.token_embedding.weight.requires_grad_(False)
    return model


@functools.cache
def tiny_tokenizer() -> open_clip.SimpleTokenizer:
    """Return open_clip's byte-pair tokenizer with a context of 16 tokens, read once per process."""
    return open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)


def load_tiny_clip(
    path: str | Path = CHECKPOINT,
) -> tuple[open_clip.CLIP, open_clip.SimpleTokenizer]:
    """Load the pretrained model, in evaluation mode on the CPU, and its tokenizer.

    Raises:
        AdapterFileError: the file is missing, damaged, or holds another model.
    """
    tensors, expected = _read(Path(path))
    if fingerprint(tensors) != expected:
        raise AdapterFileError(f"{path} is damaged: its tensors do not match their fingerprint")
    token_ids, rows = tensors.pop(_USED_IDS), tensors.pop(_USED_ROWS)
    model = build_tiny_clip()
    state = {key: value.float() for key, value in tensors.items()}
    embedding = model.token_embedding.weight.detach().clone()
    embedding[token_ids.long()] = rows.float()
    state[_EMBEDDING_KEY] = embedding
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise AdapterFileError(f"{path} does not fit the tiny CLIP: {reason}") from error
    return model.eval(), tiny_tokenizer()


def save_tiny_clip(
    model: open_clip.CLIP, path: str | Path, used_tokens: Tensor, metadata: dict[str, str]
) -> Path:
    """Write the trained tensors in half precision, with the embedding rows of `used_tokens`.

    Args:
        model: a model made by `build_tiny_clip`.
        path: the safetensors file to write.
        used_tokens: token ids whose embedding rows must be exact, in any shape and order.
        metadata: text for the header of the file: recipe, seed, versions, figures.
    """
    state = {
        key: value.detach().cpu().half().contiguous()
        for key, value in model.state_dict().items()
        if key != _EMBEDDING_KEY
    }
    token_ids = used_tokens.unique().cpu()
    state[_USED_IDS] = token_ids.to(torch.int32)
    state[_USED_ROWS] = model.token_embedding.weight.detach().cpu()[token_ids].contiguous()
    data = save(state, {**metadata, "fingerprint": fingerprint(state)})

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    return write_atomically(path, write)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Return a digest of names, shapes, types and values, equal on every machine."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def prepare_images(images: Tensor) -> Tensor:
    """Bring images to what the tiny CLIP sees: three channels of 16x16 in [-1, 1].

    The way through 32 pixels is that of the digits: bicubic, then averaged two by two. Larger
    images are smoothed before they shrink.

    Args:
        images: `(..., C, H, W)` with one or three channels; uint8, or floats in [0, 1].
    """
    batch = images.reshape(-1, *images.shape[-3:])
    batch = batch.float() / 255 if images.dtype == torch.uint8 else batch.float()
    double = 2 * IMAGE_SIZE
    resized = F.interpolate(batch, size=(double, double), mode="bicubic", antialias=True)
    small = F.avg_pool2d(resized.clamp(0, 1), 2) * 2 - 1
    return small.expand(-1, 3, -1, -1).reshape(*images.shape[:-3], 3, IMAGE_SIZE, IMAGE_SIZE)


def tiny_transform(image: Image.Image | NDArray[np.uint8]) -> Tensor:
    """Turn one picture of any size, grey or colour, into a `(3, 16, 16)` tensor in [-1, 1]."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    pixels = np.array(picture if picture.mode == "L" else picture.convert("RGB"))
    tensor = torch.from_numpy(pixels)
    return prepare_images(tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1))


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"cannot read the tiny CLIP checkpoint {path}: {error}") from error
    if "fingerprint" not in metadata or not {_USED_IDS, _USED_ROWS} <= tensors.keys():
        raise AdapterFileError(
            f"{path} is not a tiny CLIP checkpoint: scripts/pretrain_tiny_clip.py writes one"
        )
    return tensors, metadata["fingerprint"]


def _draw_token_embedding() -> Tensor:
    generator = torch.Generator().manual_seed(_EMBEDDING_SEED)
    return torch.randn(VOCABULARY, WIDTH, generator=generator) * _EMBEDDING_STD
