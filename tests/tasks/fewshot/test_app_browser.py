"""The page in a headless Chromium that can reach this computer only.

`VISIONLORA_SCREENSHOT=docs/images/app.png pytest -m slow tests/tasks/fewshot/test_app_browser.py`
keeps the picture for the documentation.
"""

import csv
import os
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from tasks.fewshot import predict
from tasks.fewshot.datasets import DIGIT_NAMES, digits
from tests.tasks.fewshot.browser import CHROMEDRIVER, CHROMIUM, Browser, free_port, wait

ROOT = Path(__file__).parents[3]
NAMES = DIGIT_NAMES[:5]
TOAST = "[data-testid=toast-text]"
GIVEN, NEW = 16, 2
"""Pictures of a digit to adapt to, and to classify."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is missing"),
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="chromium or its driver is missing"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The page in a process of its own; its address and where it keeps temporary files."""
    temporary = tmp_path_factory.mktemp("temporary")
    port = free_port()
    words = ["--port", str(port), "--browser", "false", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "app.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line
    yield f"http://127.0.0.1:{port}", temporary
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert list(temporary.iterdir()) == [], "temporary files are left"


@pytest.fixture
def browser(tmp_path) -> Iterator[Browser]:
    found = Browser(downloads=tmp_path / "downloads")
    yield found
    found.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Real handwritten digits as files: `given/zero/*.png` and `new/*.png`."""
    folder = tmp_path_factory.mktemp("digits")
    for label, name in enumerate(NAMES):
        (folder / "given" / name).mkdir(parents=True)
        (folder / "new").mkdir(exist_ok=True)
        items = [item for item in digits().train if item.label == label]
        for index, item in enumerate(items[: GIVEN + NEW]):
            place = folder / "given" / name if index < GIVEN else folder / "new"
            picture = Image.fromarray(item.source).resize((96, 96), Image.Resampling.BICUBIC)
            picture.save(place / f"{name}_{index:02d}.png")
    return folder


def field(name: str) -> str:
    return f"#{name} textarea, #{name} input"


def give(browser: Browser, pictures: Path, names=NAMES) -> None:
    """Name the classes, and drop their pictures."""
    for index, name in enumerate(names):
        if index >= 2:
            browser.click("#more")
        browser.type(field(f"name-{index}"), name)
        files = sorted((pictures / "given" / name).iterdir())
        browser.upload(f"#pictures-{index} input[type=file]", files)
        shown = f"#pictures-{index} img"
        wait(lambda shown=shown: len(browser.all(shown)) == GIVEN, 60, f"no pictures of {name}")


def set_steps(browser: Browser, steps: str) -> None:
    if not browser.all(field("steps")):
        browser.click("#settings button")
    browser.type(field("steps"), steps)
    browser.type(field("template"), "a photo of {}.")


def wait_for_progress(browser: Browser, steps: int) -> None:
    """Wait until the page says how far it is and how long the rest takes."""
    line = re.compile(rf"step \d+ of {steps}, about [\d.]+ (s|min|h) left")
    wait(lambda: line.search(browser.run("return document.body.innerText")), 60, "no progress")


def refusal(browser: Browser) -> str:
    """Press the button and return the error on the page, which is then closed."""
    browser.click("#adapt")
    text = wait(lambda: browser.text(TOAST), 30, "no error")
    browser.click("[data-testid=toast-close]")
    wait(lambda: not browser.all(TOAST), 20, "the error does not go away")
    return text


def test_people_adapt_see_predict_and_download(server, browser, pictures, tmp_path):
    url, _ = server
    browser.open(url)
    give(browser, pictures)
    set_steps(browser, "60")
    browser.click("#adapt")
    wait_for_progress(browser, 60)
    wait(lambda: "right" in browser.text("#summary"), 300, "no result")
    summary = browser.text("#summary")
    assert float(re.search(r"([\d.]+) % right", summary)[1]) >= 60
    assert "Held-out test: 25 pictures that the adapter was not trained on" in summary
    browser.find("#confusion img")

    new = sorted((pictures / "new").iterdir())
    browser.upload("#new input[type=file]", new)
    wait(lambda: len(browser.all("#new img")) == len(new), 60, "no new pictures")
    browser.click("#classify")
    wait(lambda: "10 pictures classified" in browser.text("#said"), 60, "no classes")
    wait(lambda: len(browser.all("#classified img")) == len(new), 60, "no pictures with classes")
    captions = browser.text("#classified").splitlines()

    browser.click("#download")
    file = tmp_path / "downloads" / "adapter.zip"
    wait(file.is_file, 60, "no download")
    config = {"adapter": str(file), "images": str(pictures / "new"), "output": str(tmp_path / "o")}
    predict.run(predict.PredictConfig(**config))
    rows = list(csv.DictReader((tmp_path / "o" / "predictions.csv").open()))
    assert captions == [f"{row['class']} {100 * float(row['probability']):.0f} %" for row in rows]
    right = sum(row["image"].startswith(row["class"]) for row in rows)
    assert right >= 7

    browser.click("#settings button")
    hidden = "return document.querySelector('#steps').offsetParent === null"
    wait(lambda: browser.run(hidden), 20, "the settings stay open")
    browser.click("#said")
    browser.screenshot(Path(os.environ.get("VISIONLORA_SCREENSHOT") or tmp_path / "app.png"))
    elsewhere = {url for url in browser.requested() if not url.startswith(("http://127", "data:"))}
    assert elsewhere == set(), "the page asks other computers for something"
    assert browser.complaints() == []


def test_errors_are_one_line_and_tabs_do_not_mix(server, browser, pictures, tmp_path):
    url, temporary = server
    browser.open(url)
    browser.find("#adapt")
    assert refusal(browser) == "at least two classes with pictures are needed, there are 0"
    browser.type(field("name-0"), "<b>cat</b>")
    assert refusal(browser) == "class '<b>cat</b>' has no pictures"
    give(browser, pictures, NAMES[:2])
    set_steps(browser, "many")
    assert refusal(browser) == "steps must be a whole number, got 'many'"
    set_steps(browser, "100000")
    browser.click("#adapt")
    wait_for_progress(browser, 100000)

    first = browser.tab
    second = browser.new_tab()
    browser.open(url)
    browser.find("#adapt")
    assert browser.text("#summary") == "Nothing adapted yet."
    assert not browser.all("#pictures-0 img")
    browser.upload("#new input[type=file]", sorted((pictures / "new").iterdir()))
    wait(lambda: len(browser.all("#new img")) == 10, 60, "no new pictures")

    browser.go(first)
    browser.click("#cancel")
    wait(lambda: "Cancelled" in browser.text("#summary"), 30, "not cancelled")
    set_steps(browser, "5")
    browser.click("#adapt")
    wait(lambda: "right" in browser.text("#summary"), 120, "no result after cancelling")
    browser.go(second)
    browser.click("#classify")
    assert (
        wait(lambda: browser.text(TOAST), 30, "no error") == "there is no adapter yet: adapt first"
    )

    tabs = next(temporary.glob("visionlora-app-*")) / "tabs"
    assert [path.name for path in tabs.iterdir()]
    browser.go(first)
    browser.close_tab()
    wait(lambda: not list(tabs.rglob("*.safetensors")), 60, "files of a closed tab are left")
    browser.go(second)


def test_a_zip_file_is_adapted_to(server, browser, pictures, tmp_path):
    url, _ = server
    file = tmp_path / "classes.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted((pictures / "given").rglob("*.png")):
            archive.write(path, path.relative_to(pictures))
        archive.writestr("given/zero/broken.png", b"no picture")
    browser.open(url)
    browser.find("#adapt")
    browser.run("[...document.querySelectorAll('button[role=tab]')].at(-1).click()")
    browser.upload("#archive input[type=file]", [file])
    browser.find("#archive .filename")
    set_steps(browser, "2")
    browser.click("#adapt")
    wait(lambda: "right" in browser.text("#summary"), 120, "no result")
    assert "1 unreadable and left out: broken.png" in browser.text("#summary")


def test_a_taken_port_is_said_in_one_line(server):
    port = server[0].rpartition(":")[2]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "app.py"), "--port", port],
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": folder},
        )
    assert done.returncode == 2
    assert done.stderr == f"error: port {port} is not free; choose another one with --port\n"
