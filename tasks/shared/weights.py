"""Where pretrained weights are: in a cache, or on a host that can be reached; soon said if neither.

Left to themselves, the download libraries retry for a minute before they give up.
"""

import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from visionlora.errors import ConfigError

PROBE_SECONDS = 3.0
"""How long to wait for the weights' host before saying that there is no network."""
OLD_CACHE = Path("~/.cache/clip")
"""Where OpenAI's package, and open_clip for plain addresses, keep their downloads."""
DEFAULT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def require_weights(
    name: str, tag_name: str, hub: str, url: str = "", *, way_out: str
) -> Path | None:
    """Return the cached weights file, or None if their host answers.

    Args:
        name: Model, for the message.
        tag_name: Name of the weights, for the message.
        hub: `owner/repository/` or `owner/repository/file` on the Hugging Face Hub, if any.
        url: Address of the file elsewhere; with `hub` its last part, the file's name, is enough.
        way_out: What can be done without the weights, for the message.

    Raises:
        ConfigError: neither.
    """
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

    old = OLD_CACHE.expanduser() / url.rpartition("/")[2]
    if url and old.is_file():
        return old
    if hub:
        repo, _, file = hub.rpartition("/")
        files = [file] if file else list(DEFAULT_FILES)
        if file.endswith((".bin", ".pth")):
            files.insert(0, f"{file[:-4]}.safetensors")
        for candidate in files:
            cached = try_to_load_from_cache(repo, candidate)
            if isinstance(cached, str):
                return Path(cached)
        url = hf_hub_url(repo, files[-1])
    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable(url)
    if problem:
        raise ConfigError(
            f"no weights for {name} ({tag_name}): not in the cache, and {problem}; {way_out}"
        )
    return None


def _unreachable(url: str) -> str:
    """Return why `url` cannot be reached, or an empty string.

    The probe runs on its own thread because name resolution obeys no timeout.
    """
    host = url.split("/")[2]
    problem = [f"{host} did not answer within {PROBE_SECONDS:g} s"]

    def probe() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            opener = urllib.request.build_opener(_NoRedirect)
            opener.open(request, timeout=PROBE_SECONDS).close()
            problem[0] = ""
        except urllib.error.HTTPError as error:
            # A redirect, a missing file or a login is an answer: the download itself tells more.
            known = error.code < 400 or error.code in (401, 404)
            problem[0] = "" if known else f"{host} answers {error}"
        except OSError as error:
            problem[0] = f"{host} cannot be reached ({getattr(error, 'reason', error)})"

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return problem[0]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Take a redirect for an answer instead of following it."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow nothing."""
