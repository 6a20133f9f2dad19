"""What a protocol runs follows from its name, and what makes no sense is refused at once."""

from pathlib import Path

import pytest

from tasks.fewshot.coop.table import ELEVEN, PUBLIC_SETS, SHIFTED, TRANSFER
from tasks.fewshot.protocol.config import ProtocolConfig, path_name
from visionlora.errors import ConfigError
from visionlora.training.cli import parse

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "configs" / "fewshot" / "protocols").glob("*.yaml"))


def protocol(name: str, **options) -> ProtocolConfig:
    return ProtocolConfig(name=name, **options)


@pytest.mark.parametrize(
    ("name", "trained", "tested", "shots"),
    [
        ("few-shot", ELEVEN, ELEVEN, [1, 2, 4, 8, 16]),
        ("base-to-new", ELEVEN, ELEVEN, [16]),
        ("cross-dataset", ("imagenet",), TRANSFER, [16]),
        ("domain-generalisation", ("imagenet",), SHIFTED, [16]),
    ],
)
def test_the_tables_of_the_literature_are_the_defaults(name, trained, tested, shots):
    config = protocol(name, backbone="ViT-B/16")
    cells = config.cells()
    assert tuple(dict.fromkeys(cell.dataset for cell in cells)) == trained
    assert tuple(config.datasets) == tested
    assert config.all_shots == shots
    assert config.seed == [1, 2, 3]
    assert len(cells) == len(trained) * len(shots) * len(config.method)


def test_the_tiny_model_takes_the_digits():
    assert protocol("few-shot").datasets == protocol("base-to-new").datasets == ["digits"]


def test_every_cell_has_a_folder_of_its_own():
    methods = ["lora", "lora+glad", "lora(rank=4)", "block-lora(layout=grid)+glad(rho=0.1)"]
    config = protocol("few-shot", method=methods, dataset=["digits", "folder:a/b", "folder:a/c"])
    paths = [cell.path for cell in config.cells()]
    assert len(set(paths)) == len(paths) == 4 * 3 * 5
    assert "cells/digits/block-lora(layout=grid)+glad(rho=0.1)/16-shot" in paths


@pytest.mark.parametrize("text", ["../x", "a/../../b", 'a:b"c', ".", "x" * 300])
def test_a_name_stays_one_part_of_a_path(text):
    name = path_name(text)
    assert "/" not in name
    assert not name.startswith(".")
    assert len(name) <= 100


def test_a_cell_is_an_ordinary_run_with_the_options_of_the_protocol():
    config = protocol("base-to-new", backbone="tiny", steps=7, lr=[0.1], encoder="text")
    run = config.cell("lora(rank=4)", "digits", 16)
    assert (run.setting, run.steps, run.lr, run.encoder) == ("base-to-new", 7, 0.1, "text")
    assert run.resolved(("a {}",)).adapter["rank"] == 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("few-shot", {"method": ["lora", "lora"]}, "--method names something twice"),
        ("few-shot", {"shots": []}, "--shots needs at least one"),
        ("few-shot", {"shots": [0]}, "--shots must be at least 1"),
        ("few-shot", {"source": "imagenet"}, "--source belongs to cross-dataset"),
        ("few-shot", {"rate_seed": [1]}, "--rate-seed chooses among several"),
        ("few-shot", {"lr": ["auto", 0.1]}, "--lr auto searches by itself"),
        ("few-shot", {"lr": [0.1, -1.0]}, "--lr must be"),
        ("few-shot", {"method": ["lora", "lorra"]}, "did you mean 'lora'"),
        ("few-shot", {"method": ["block-lora(layuot=grid)"]}, "did you mean 'layout'"),
        ("cross-dataset", {"dataset": ["dtd", "imagenet"]}, "imagenet is the source"),
        ("cross-dataset", {"baselines": ["prototype"]}, "know nothing of other classes"),
        ("few-shot", {"text_chunk": 0}, "--text-chunk must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        protocol(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_protocols_are_valid_and_say_how_to_run_them(file):
    config = parse(ProtocolConfig, ["--config", str(file)])
    assert config.cells()
    first = file.read_text().splitlines()[0]
    path = file.relative_to(ROOT).as_posix()
    assert first.startswith(f"# python scripts/fewshot.py protocol --config {path}")


def test_the_documented_data_sets_are_those_of_the_table():
    lines = (ROOT / "docs" / "fewshot.md").read_text().splitlines()
    for name, source in PUBLIC_SETS.items():
        folder = str(source.layouts[0].pictures(Path()))
        (line,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == f"`{folder}`"
        assert cells[3] == source.template
        assert not source.split_name or cells[2] == f"`{source.split_file}`"
