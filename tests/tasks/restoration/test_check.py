"""The check of a folder: what it counts, and that it names everything that is wrong."""

import math

import pytest

from tasks.restoration.check import CheckConfig, run
from tests.tasks.restoration.pictures import waves, write, write_pairs
from visionlora.errors import ConfigError, DataError


def test_a_sound_folder_is_counted_and_measured(tmp_path, capsys):
    write_pairs(tmp_path, 5)
    write(tmp_path / "sheet.png", waves(9))
    found = run(CheckConfig(data=str(tmp_path), few=3))
    assert found["layout"] == "input-target"
    assert found["pairs"] == 5
    assert found["sizes"] == {"48 x 40": 5}
    assert found["folders"] == {"input": 5}
    assert found["kinds"] == {"RGB, 8 bits": 6}
    assert (found["decoded"], found["elsewhere"]) == (3, 1)
    # Noise of 0.1, a little of which the range cuts off.
    assert found["psnr_input"] == pytest.approx(-20 * math.log10(0.1), abs=1)
    printed = capsys.readouterr().out
    assert [name in printed for name in ("input/0:", "input/2:", "input/4:")] == [True] * 3
    assert run(CheckConfig(data=str(tmp_path), few=0))["decoded"] == 5


def test_everything_wrong_is_named_at_once(tmp_path, capsys):
    write_pairs(tmp_path, 3)
    write(tmp_path / "input" / "alone.png", waves(0))
    write(tmp_path / "input" / "1.png", waves(0, 20, 30))
    (tmp_path / "target" / "2.png").write_bytes(b"broken")
    whole = (tmp_path / "input" / "0.png").read_bytes()
    (tmp_path / "input" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="4 things cannot be used"):
        run(CheckConfig(data=str(tmp_path)))
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong")]
    for word in ("alone", "0.png", "1.png", "2.png"):
        assert sum(word in line for line in wrong) == 1
    assert len(wrong) == 4


def test_equal_halves_are_noted_and_left_out(tmp_path, capsys):
    for side in ("lq", "gt"):
        write(tmp_path / side / "a.png", waves(0))
    assert run(CheckConfig(data=str(tmp_path)))["psnr_input"] is None
    assert "one picture twice" in capsys.readouterr().out


def test_clean_pictures_are_counted(tmp_path):
    write(tmp_path / "a.png", waves(0))
    write(tmp_path / "b.png", waves(0, 20, 30))
    found = run(CheckConfig(data=f"prod:{tmp_path}"))
    assert found == {"pictures": 2, "sizes": {"48 x 40": 1, "30 x 20": 1}}
    with pytest.raises(ConfigError, match="got -1"):
        run(CheckConfig(data=str(tmp_path), few=-1))
