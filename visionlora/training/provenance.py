"""What a result file says about where it came from: versions, commit, memory."""

import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = (
    "visionlora",
    "torch",
    "torchvision",
    "accelerate",
    "safetensors",
    "numpy",
    "timm",
    "open_clip_torch",
    "diffusers",
    "transformers",
)


def versions() -> dict[str, str]:
    """Return the versions of python and of the main packages that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of the checkout this package runs from, or None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def peak_memory_mb() -> float:
    """Return the peak of GPU memory, or of resident memory when no GPU is used."""
    if torch.cuda.is_available():
        peak = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        if peak:
            return peak / 2**20
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)
