"""The page itself: what is on it, and what its buttons do."""

import html
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from tasks.fewshot.adapter_zip import pack
from tasks.fewshot.app import wording
from tasks.fewshot.app.engine import MAX_STEPS, Cancelled, Engine, Settings
from tasks.fewshot.app.holdout import Measure
from tasks.fewshot.app.pictures import from_rows, from_zip, readable
from tasks.fewshot.app.session import Session, Sessions
from tasks.fewshot.datasets import DEFAULT_TEMPLATE
from tasks.fewshot.folder import IMAGE_SUFFIXES
from tasks.fewshot.pictures import save_confusion
from visionlora.errors import ConfigError, DataError, VisionLoraError

ROWS = 12
"""Classes that can be given one by one; more fit into a zip file."""
OPEN_ROWS = 2
MAX_SHOTS = 64
METHODS = ["block-lora", "lora", "dora", "block-lora+glad", "lora-fa", "rand-lora", "bitfit"]
COLUMNS = ["picture", "class", "second", "third"]
SUFFIXES = sorted(IMAGE_SUFFIXES)

CSS = """
.gradio-container { max-width: 1400px !important; width: 100%; margin: auto; }
.upload-row { align-items: stretch; }
.pictures .grid-container {
    grid-template-columns: repeat(auto-fill, 52px) !important; gap: 4px; padding: 4px 64px 4px 4px;
    grid-template-rows: none !important; grid-auto-rows: 52px !important;
}
.pictures .gallery-item, .pictures .thumbnail-item {
    width: 52px; height: 52px !important; border-radius: 6px;
}
.results .grid-container { grid-template-columns: repeat(auto-fill, 96px) !important; gap: 8px; }
.results .grid-wrap { min-height: 0; }
.results img { padding-bottom: 20px; }
.results .caption-label {
    font-size: 12px; left: 2px; right: 2px; bottom: 2px; max-width: none; text-align: center;
}
#summary { padding: 12px 16px; }
#summary h3 { margin: 0 0 4px; font-size: 20px; }
#confusion img { max-height: 380px; }
#table table, #table td, #table th { font-size: 13px; font-family: inherit; }
"""
FONT = ["system-ui", "sans-serif"]
MONO = ["ui-monospace", "monospace"]

log = logging.getLogger("visionlora")


def look() -> dict[str, Any]:
    """Return the arguments of `launch` for the looks: fonts of this computer only."""
    return {"css": CSS, "theme": gr.themes.Soft(font=FONT, font_mono=MONO)}


class Handlers:
    """What the buttons do, for the tab that a request comes from."""

    def __init__(self, engine: Engine, sessions: Sessions) -> None:
        self.engine = engine
        self.sessions = sessions

    def adapt(
        self,
        request: gr.Request,
        archive: str | None,
        method: str,
        shots: float,
        steps: str | None,
        lr: str | None,
        template: str | None,
        measure: Measure,
        *rows: Any,
        progress: Any = None,
    ) -> tuple[Any, ...]:
        """Adapt to the pictures, and return summary, confusion picture and download."""
        session = self._session(request)
        with one_line(), session.work() as place:
            settings = Settings(
                method=method or "",
                shots=int(shots),
                steps=_number(steps, int, "steps must be a whole number"),
                lr=_number(lr, float, "the learning rate must be a number"),
                template=(template or "").strip(),
                measure=measure,
            )
            tree = from_rows(_rows(rows))
            if archive and tree:
                raise DataError("there are pictures in the rows and in the zip file; remove one")
            if archive:
                tree = from_zip(Path(archive), place / "pictures")
            progress(0, desc="looking at the pictures")
            adapted = self.engine.adapt(
                readable(tree),
                settings,
                place,
                lambda done, text: progress(done, desc=text),
                session.cancel,
            )
            picture = None
            if adapted.scores is not None:
                title = wording.confusion_title(adapted.scores)
                matrix = adapted.scores.confusion()
                picture = save_confusion(matrix, adapted.classes, title, place / "confusion.png")
            file = pack(adapted.folder, place / "adapter.zip")
            session.adapted = adapted
        return (
            wording.summary(adapted),
            gr.Image(value=str(picture) if picture else None, visible=picture is not None),
            gr.DownloadButton(value=str(file), interactive=True),
        )

    def predict(self, request: gr.Request, pictures: Any) -> tuple[str, Any, Any]:
        """Classify new pictures with this tab's adapter."""
        session = self._session(request)
        with one_line():
            files = _files(pictures)
            if session.adapted is None:
                raise DataError("there is no adapter yet: adapt first")
            if not files:
                raise DataError("there are no pictures to classify")
            found = self.engine.predict(session.adapted.folder, files)
        shown = [(str(item.file), wording.caption(item)) for item in found if not item.error]
        rows = [wording.table_row(item) for item in found]
        return (
            wording.predicted(found),
            gr.Gallery(value=shown, visible=bool(shown)),
            gr.Dataframe(value=rows, visible=True),
        )

    def cancel(self, request: gr.Request) -> str:
        """End the adaptation of this tab after the step it is at."""
        session = self._session(request)
        session.cancel.set()
        if session.adapted is None:
            return "Cancelled."
        return "Cancelled. This is the adapter from before:\n\n" + wording.summary(session.adapted)

    def close(self, request: gr.Request) -> None:
        """Clean up after a tab."""
        self.sessions.close(str(request.session_hash))

    def _session(self, request: gr.Request) -> Session:
        return self.sessions.of(str(request.session_hash))


@contextmanager
def one_line() -> Iterator[None]:
    """Turn errors into one line on the page; defects go to the log of the server, too."""
    try:
        yield
    except Cancelled:
        raise gr.Error("cancelled", title="Cancelled", duration=5, print_exception=False) from None
    except VisionLoraError as error:
        raise _refused(" ".join(str(error).split())) from None
    except Exception as error:
        log.exception("unexpected error on the page")
        what = " ".join(str(error).split())[:200]
        raise _refused(
            f"unexpected {type(error).__name__}: {what} (more in the terminal)"
        ) from None


def _refused(line: str) -> gr.Error:
    return gr.Error(
        html.escape(line), title="That does not work", duration=None, print_exception=False
    )


def build(engine: Engine, sessions: Sessions) -> gr.Blocks:
    """Return the page."""
    handlers = Handlers(engine, sessions)

    def adapt(request: gr.Request, *values: Any, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        return handlers.adapt(request, *values, progress=progress)

    # One at a time uses the model; others wait in the queue, which the page shows.
    alone: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    private: dict[str, Any] = {"api_visibility": "private"}
    with gr.Blocks(
        title="visionlora", analytics_enabled=False, delete_cache=(600, 86400), fill_width=True
    ) as page:
        gr.Markdown(
            f"## Teach a CLIP model your own classes\nA few pictures per class are enough. "
            f"Everything stays on this computer. Model: {wording.safe(engine.backbone.name)}."
        )
        with gr.Row():
            with gr.Column(scale=6):
                rows, archive = _inputs(private)
                settings = _settings()
                with gr.Row():
                    start = gr.Button("Adapt", variant="primary", elem_id="adapt", scale=3)
                    stop = gr.Button("Cancel", variant="stop", elem_id="cancel", scale=1)
                gr.Markdown("### 3. New pictures")
                new = _gallery("new")
                classify = gr.Button("Classify", variant="primary", elem_id="classify")
            with gr.Column(scale=5):
                gr.Markdown("### 2. Result")
                summary = gr.Markdown(
                    "Nothing adapted yet.", elem_id="summary", container=True, min_height=90
                )
                confusion = gr.Image(
                    show_label=False,
                    type="filepath",
                    interactive=False,
                    visible=False,
                    buttons=["download", "fullscreen"],
                    elem_id="confusion",
                )
                download = gr.DownloadButton(
                    "Download the adapter", interactive=False, elem_id="download"
                )
                predictions = _predictions()
        running = start.click(
            adapt, [archive, *settings, *rows], [summary, confusion, download], **alone, **private
        )
        classify.click(handlers.predict, new, predictions, **alone, **private)
        stop.click(handlers.cancel, None, summary, cancels=[running], queue=False, **private)
        page.unload(handlers.close)
    return page


def _inputs(private: dict[str, Any]) -> tuple[list[Any], Any]:
    """Lay out the rows of classes and the zip file; return the components that hold them."""
    gr.Markdown("### 1. Pictures")
    fields: list[Any] = []
    with gr.Tab("Class by class"):
        lines = []
        for index in range(ROWS):
            with gr.Row(visible=index < OPEN_ROWS, elem_classes="upload-row") as line:
                name = gr.Textbox(
                    label=f"Class {index + 1}",
                    placeholder="red fox",
                    lines=1,
                    min_width=130,
                    scale=2,
                    elem_id=f"name-{index}",
                )
                files = _gallery(f"pictures-{index}", scale=5)
            fields += [name, files]
            lines.append(line)
        more = gr.Button("Another class", size="sm", elem_id="more")
        shown = gr.State(OPEN_ROWS)

        def another(count: int) -> list[Any]:
            count = min(count + 1, ROWS)
            return [count, *(gr.Row(visible=index < count) for index in range(ROWS))]

        more.click(another, shown, [shown, *lines], show_progress="hidden", **private)
    with gr.Tab("Zip file"):
        archive = gr.File(
            label="A zip file with one folder of pictures per class",
            file_types=[".zip"],
            type="filepath",
            elem_id="archive",
        )
    return fields, archive


def _gallery(name: str, scale: int | None = None) -> gr.Gallery:
    """Return a place to drop pictures, which shows them small."""
    return gr.Gallery(
        show_label=False,
        type="filepath",
        file_types=SUFFIXES,
        sources=["upload"],
        columns=8,
        height=126,
        object_fit="cover",
        interactive=True,
        allow_preview=False,
        buttons=[],
        scale=scale,
        elem_id=name,
        elem_classes="pictures",
    )


def _settings() -> list[Any]:
    """Lay out the settings, which all have sensible values."""
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        with gr.Row():
            method = gr.Dropdown(
                METHODS,
                value=METHODS[0],
                label="Method",
                info="any name or product of the registry",
                allow_custom_value=True,
                elem_id="method",
            )
            shots = gr.Slider(
                1,
                MAX_SHOTS,
                16,
                step=1,
                label="Pictures per class",
                info="at most so many of a class train",
            )
        with gr.Row():
            steps = gr.Textbox(
                label="Steps",
                info=f"automatic: the recipe's, at most {MAX_STEPS}",
                placeholder="automatic",
                elem_id="steps",
            )
            lr = gr.Textbox(
                label="Learning rate",
                info="automatic: the recipe's",
                placeholder="automatic",
                elem_id="lr",
            )
        with gr.Row():
            template = gr.Textbox(
                DEFAULT_TEMPLATE, label="Sentence", info="{} is the class", elem_id="template"
            )
            measure = gr.Dropdown(
                list(get_args(Measure)),
                value="automatic",
                label="Measure accuracy by",
                info="cross-validation trains up to 5 more adapters",
            )
    return [method, shots, steps, lr, template, measure]


def _predictions() -> list[Any]:
    """Lay out what is found in new pictures."""
    said = gr.Markdown(elem_id="said")
    pictures = gr.Gallery(
        show_label=False,
        columns=6,
        height="auto",
        object_fit="contain",
        interactive=False,
        visible=False,
        buttons=[],
        elem_id="classified",
        elem_classes="results",
    )
    table = gr.Dataframe(
        headers=COLUMNS, interactive=False, visible=False, wrap=True, elem_id="table"
    )
    return [said, pictures, table]


def _number(text: str | None, kind: Callable[[str], Any], complaint: str) -> Any:
    """Return the number in a field, or None if it is left empty."""
    try:
        return kind(text) if text and text.strip() else None
    except ValueError:
        raise ConfigError(f"{complaint}, got {text!r}") from None


def _rows(values: tuple[Any, ...]) -> list[tuple[str, list[Path]]]:
    """Return name and files of every row; values alternate."""
    return [
        (name or "", _files(files)) for name, files in zip(values[::2], values[1::2], strict=True)
    ]


def _files(pictures: Any) -> list[Path]:
    """Return the files of a gallery, which is None while it is empty."""
    return [Path(file) for file, _ in pictures or []]
