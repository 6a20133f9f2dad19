"""The progress display outside and inside a terminal."""

import io
import sys

from visionlora.training import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_are_rare(capsys):
    with Progress(100, "toy", plain_every=1000.0) as progress:
        for step in range(1, 101):
            progress.update(step, 0.5, 0.1)
    assert capsys.readouterr() == ("", "")


def test_a_plain_line_says_where_the_run_is(capsys):
    with Progress(100, "toy", start=40, plain_every=0.0) as progress:
        progress.update(50, 0.5, 0.1)
    line = capsys.readouterr().err
    assert line.startswith("toy: 50/100 loss 0.5 lr 0.1 ")
    assert line.endswith("s left\n")
    assert line.count("\n") == 1


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(100, "toy") as progress:
        progress.update(50, 0.5, 0.1)
    shown = terminal.getvalue()
    assert "toy" in shown
    assert "50/100" in shown
    assert "loss 0.5 lr 0.1" in shown


def test_other_processes_are_silent(capsys):
    with Progress(10, enabled=False, plain_every=0.0) as progress:
        progress.update(5, 0.5, 0.1)
    assert capsys.readouterr() == ("", "")
