"""tiny-vit: a small vision transformer whose weights ship with the project, and its making.

model.py         the network, on timm's VisionTransformer
weights.py       tiny_vit(): the network with the weights beside it, model.safetensors
photographs.py   pictures of a folder -> photographs in one memory map
crops.py         altered square crops of photographs
teacher.py       EfficientNet-Lite0 up to stride 16
distil.py        teach the network the teacher's features (scripts/make_tiny_vit.py)
export.py        a run -> the file that ships
README.md        the model card
"""

from tasks.shared.tiny_vit.model import MEAN, PATCH, STD, TinyViT
from tasks.shared.tiny_vit.weights import tiny_vit

__all__ = ["MEAN", "PATCH", "STD", "TinyViT", "tiny_vit"]
