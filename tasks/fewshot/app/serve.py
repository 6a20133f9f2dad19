"""Start the page on this computer, and clean up behind it."""

import logging
import os
import signal
import socket
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from tasks.fewshot.app.engine import Engine
from tasks.fewshot.app.session import Sessions
from tasks.fewshot.backbones import TINY
from tasks.fewshot.report import print_note
from visionlora.errors import ConfigError

LOCAL, NETWORK = "127.0.0.1", "0.0.0.0"
FIRST_PORT, PORTS = 7860, 100
MAX_UPLOAD = "2gb"


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """Open a page in the browser on which CLIP is adapted to a few pictures per class."""

    backbone: str = TINY
    """tiny, ViT-B/16, ViT-B/32, ViT-L/14 or any model name of open_clip."""
    pretrained: str | None = None
    """Weights: a tag of open_clip, a file, or none (random, for timing only)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    port: int | None = None
    """Port of the page; default the first free one from 7860 on."""
    share: Literal["never", "network"] = "never"
    """never: this computer only; network: others in the local network too, without a password."""
    browser: bool = True
    """Open the page in a browser."""

    def __post_init__(self) -> None:
        """Check the port."""
        if self.port is not None and not 0 < self.port < 65536:
            raise ConfigError(f"--port must be between 1 and 65535, got {self.port}")


def run(config: AppConfig) -> None:
    """Serve the page until Ctrl-C or a signal to end.

    Raises:
        VisionLoraError: gradio is missing, the port is taken, or the model cannot be loaded.
    """
    host = NETWORK if config.share == "network" else LOCAL
    port = _port(config.port, host)
    with tempfile.TemporaryDirectory(prefix="visionlora-app-") as name:
        root = Path(name)
        # Read by Gradio when it is imported: what is uploaded ends with us, and nobody is told.
        os.environ["GRADIO_TEMP_DIR"] = str(root / "uploads")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        try:
            from tasks.fewshot.app.page import build, look
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "gradio":
                raise
            raise ConfigError("the page needs gradio: pip install 'visionlora[app]'") from error
        # Its client logs every request of its own start.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        engine = Engine(config.backbone, config.pretrained, config.device)
        page = build(engine, Sessions(root / "tabs"))
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=config.browser,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            max_file_size=MAX_UPLOAD,
            **look(),
        )
        print_note(f"the page is at http://{LOCAL}:{port} (Ctrl-C ends it)")
        try:
            _wait()
        finally:
            page.close(verbose=False)


def _port(wanted: int | None, host: str) -> int:
    """Return a port that is free now."""
    candidates = [wanted] if wanted else range(FIRST_PORT, FIRST_PORT + PORTS)
    for port in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    what = f"port {wanted} is" if wanted else f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are"
    raise ConfigError(f"{what} not free; choose another one with --port")


def _wait() -> None:
    """Return at Ctrl-C or when the process is asked to end."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    while not ended.wait(1.0):
        pass
