"""Command lines from dataclasses."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml

from visionlora.errors import ConfigError, OutputError
from visionlora.training.cli import parse, run_cli


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Optimiser."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the moments."""

    def __post_init__(self):
        if self.lr < 0:
            raise ConfigError(f"lr must not be negative, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A toy task."""

    backbone: str = "tiny"
    """Which backbone to adapt."""
    setting: Literal["all", "base-to-new"] = "all"
    """Which classes are seen."""
    seed: list[int] = field(default_factory=lambda: [1])
    """One run per seed."""
    targets: list[str] | None = None
    """Which layers."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of the method."""
    optim: Optim = field(default_factory=Optim)
    """The optimiser."""
    limit_steps: int | None = None
    """Stop early."""
    rates: list[float | Literal["auto"]] | None = None
    """Learning rates."""
    beside: list[Literal["probe", "cache"]] = field(default_factory=list)
    """What is measured, too."""
    resume: bool = False
    """Continue a run."""


def test_no_arguments_give_the_defaults():
    assert parse(Toy, []) == Toy()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--backbone ViT-B/16", {"backbone": "ViT-B/16"}),
        ("--backbone=16", {"backbone": "16"}),
        ("--setting base-to-new", {"setting": "base-to-new"}),
        ("--seed 1 2 3", {"seed": [1, 2, 3]}),
        ("--seed 4", {"seed": [4]}),
        ("--seed=[5,6]", {"seed": [5, 6]}),
        ("--targets attn.qkv[q,v] 1", {"targets": ["attn.qkv[q,v]", "1"]}),
        ("--targets null", {"targets": None}),
        ("--limit-steps 3", {"limit_steps": 3}),
        ("--limit_steps 3", {"limit_steps": 3}),
        ("--resume", {"resume": True}),
        ("--resume false", {"resume": False}),
        ("--resume --seed 2", {"resume": True, "seed": [2]}),
        ("--optim.lr 1e-4", {"optim": Optim(lr=1e-4)}),
        ("--optim.betas 0.5 0.6", {"optim": Optim(betas=(0.5, 0.6))}),
        (
            "--adapter.rank 2 --adapter.dropout 1e-1 --adapter.layout grid --adapter.on true",
            {"adapter": {"rank": 2, "dropout": 0.1, "layout": "grid", "on": True}},
        ),
        ("--adapter.blocks [1,2] --adapter.names a b", {"adapter": {"blocks": [1, 2],
                                                                    "names": ["a", "b"]}}),
    ],
)  # fmt: skip
def test_flags(line, expected):
    assert parse(Toy, line.split()) == dataclasses.replace(Toy(), **expected)


def test_flags_override_the_file_and_options_of_the_method_merge(tmp_path):
    file = tmp_path / "toy.yaml"
    file.write_text("backbone: a\nseed: [7]\noptim: {lr: 1e-2}\nadapter: {rank: 4, alpha: 8}\n")
    found = parse(Toy, ["--backbone", "b", "--adapter.rank", "2", "--config", str(file)])
    assert found.optim == Optim(lr=1e-2)
    assert found.seed == [7]
    found = parse(Toy, ["--config", str(file), "--backbone", "b", "--adapter.rank", "2"])
    assert (found.backbone, found.adapter) == ("b", {"rank": 2, "alpha": 8})


def test_printed_config_reads_back(tmp_path, capsys):
    line = ["--seed", "1", "2", "--adapter.rank", "2", "--optim.lr", "0.5"]
    with pytest.raises(SystemExit) as stop:
        parse(Toy, [*line, "--print_config"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["seed"] == [1, 2]
    (tmp_path / "again.yaml").write_text(text)
    assert parse(Toy, ["--config", str(tmp_path / "again.yaml")]) == parse(Toy, line)


def test_help_shows_the_documentation_of_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Toy, ["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for words in (
        "Which backbone to adapt.",
        "Peak learning rate.",
        "--limit-steps",
        "Stop early.",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--backbon x", "unknown option '--backbon' (did you mean '--backbone'?)"),
        ("--limit-step 3", "unknown option '--limit-step' (did you mean '--limit-steps'?)"),
        ("--optim.lrr 3", "unknown option '--optim.lrr' (did you mean '--optim.lr'?)"),
        ("--back x", "unknown option '--back' (did you mean '--backbone'?)"),
        ("--setting base-to-ne", "--setting 'base-to-ne' is none of all, base-to-new "
                                 "(did you mean 'base-to-new'?)"),
        ("--optim.lr fast", "--optim.lr must be a number, got 'fast'"),
        ("--limit-steps x", "--limit-steps must be a whole number, got 'x'"),
        ("--seed one", "--seed must be whole numbers, got 'one'"),
        ("--seed 1 one", "--seed must be whole numbers, got 'one'"),
        ("--rates 0.1 fast", "--rates must be numbers or auto, got '0.1 fast'"),
        ("--resume maybe", "--resume must be true or false, got 'maybe'"),
        ("--beside cache prob", "--beside 'prob' is none of probe, cache (did you mean 'probe'?)"),
        ("--seed", "option '--seed' needs a value"),
        ("--backbone a b", "option '--backbone' takes one value, got a b"),
        ("tiny", "unexpected argument 'tiny'; options start with --"),
        ("--optim.lr -1", "lr must not be negative, got -1.0"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: parse(Toy, line.split()) and None)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("backbon: x", r"unknown option 'backbon' in .*toy.yaml \(did you mean 'backbone'\?\)"),
        ("optim: {lrr: 3}", r"unknown option 'optim\.lrr' .*\(did you mean 'optim\.lr'\?\)"),
        ("setting: some", "--setting 'some' is none of all, base-to-new"),
        ("a: [", "is not YAML"),
        ("- 1", "must hold 'option: value' lines, got list"),
    ],
)
def test_mistakes_in_the_file_are_one_line(tmp_path, content, message):
    (tmp_path / "toy.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse(Toy, ["--config", str(tmp_path / "toy.yaml")])
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        parse(Toy, ["--config", str(tmp_path / "nowhere.yaml")])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["data"], "missing option --data"),
        (["data", "out_dir"], "missing option --data and --out-dir"),
    ],
)
def test_options_without_a_default_are_asked_for(names, message):
    config = dataclasses.make_dataclass("Config", [(name, str) for name in names])
    with pytest.raises(ConfigError, match=f"^{message}$"):
        parse(config, [])


def test_exit_codes(capsys):
    def code(run):
        with pytest.raises(SystemExit) as stop:
            run_cli(run)
        return stop.value.code

    def full():
        raise OutputError("cannot write\nhere")

    def stopped():
        raise KeyboardInterrupt

    assert code(lambda: None) == 0
    assert code(lambda: 3) == 3
    assert code(full) == 2
    assert code(stopped) == 130
    assert capsys.readouterr().err == "error: cannot write here\ninterrupted\n"


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 // 0)
