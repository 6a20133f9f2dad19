"""Where open_clip's pretrained weights are, and what can be done without them."""

from pathlib import Path
from typing import Any

from tasks.shared import weights
from visionlora.errors import ConfigError

WAY_OUT = (
    "pass a file (--pretrained FILE), fill the cache (run once with network), use --backbone tiny, "
    "or --pretrained none (random weights, for timing only)"
)


def tagged_weights(name: str, tag_name: str, tag: dict[str, Any]) -> Path:
    """Return the weights file of an open_clip tag, from a cache or freshly downloaded.

    Raises:
        ConfigError: the weights are in no cache and cannot be downloaded.
    """
    hub, url = str(tag.get("hf_hub", "")), str(tag.get("url", ""))
    if (cached := require_weights(name, tag_name, hub, url)) is not None:
        return cached
    from open_clip.pretrained import download_pretrained

    try:
        return Path(download_pretrained(tag))
    except Exception as error:  # open_clip and the hub raise whatever their transport raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"no weights for {name} ({tag_name}): the download failed ({reason}); {WAY_OUT}"
        ) from error


def require_weights(name: str, tag_name: str, hub: str, url: str = "") -> Path | None:
    """Return the cached weights file, or None if their host answers (`tasks/shared/weights.py`)."""
    return weights.require_weights(name, tag_name, hub, url, way_out=WAY_OUT)
