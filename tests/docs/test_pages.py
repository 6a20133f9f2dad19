"""What the pages show runs, and their tables are those of the registry."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "docs" / "methods" / name for name in ("index.md", "starts-and-dynamics.md")),
]


def python_blocks(page: Path) -> str:
    """The blocks of one page build on each other, so they run as one program."""
    return "\n".join(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name
)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    exec(compile(python_blocks(page), str(page), "exec"), {"__name__": "__page__"})
    assert list(tmp_path.rglob("*.safetensors")), "the example saves an adapter"


def test_tables_match_the_registry():
    done = subprocess.run(
        [sys.executable, "scripts/tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
    named = re.findall(
        r"`((?:docs|tests|scripts|benchmarks|visionlora|tasks|configs)/[\w./-]+)`", text
    )
    assert not [path for path in named if not (ROOT / path).exists()]


def test_an_unknown_option_of_the_table_maker_rewrites_nothing():
    done = subprocess.run(
        [sys.executable, "scripts/tables.py", "--chekc"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--chekc" in done.stderr
