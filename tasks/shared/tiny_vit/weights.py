"""tiny-vit with the weights that ship beside this file."""

from pathlib import Path

from safetensors.torch import load_file

from tasks.shared.tiny_vit.model import TinyViT
from visionlora.errors import DataError

FILE = Path(__file__).parent / "model.safetensors"


def tiny_vit(pretrained: bool = True, file: Path = FILE, num_classes: int = 0) -> TinyViT:
    """Return tiny-vit in evaluation mode.

    Args:
        pretrained: with the weights of `file`; random ones otherwise.
        file: weights of another making, as `scripts/make_tiny_vit.py export` writes them.
        num_classes: outputs of a linear head, which is random.

    Raises:
        DataError: the file is missing or holds something else.
    """
    model = TinyViT(num_classes=num_classes)
    if pretrained:
        try:
            state = {key: value.float() for key, value in load_file(file).items()}
        except Exception as error:  # safetensors' own, or OSError
            reason = str(error).splitlines()[0]
            raise DataError(f"{file} cannot be read as weights: {reason}") from error
        own = {key: value for key, value in model.state_dict().items() if "head." not in key}
        shapes = {key: tuple(value.shape) for key, value in own.items()}
        if shapes != {key: tuple(value.shape) for key, value in state.items()}:
            raise DataError(f"{file} does not hold weights of tiny-vit")
        model.load_state_dict(state, strict=False)
    return model.eval()
