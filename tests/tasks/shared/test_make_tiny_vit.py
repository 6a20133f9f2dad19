"""Making the embedded backbone: photographs, crops, teacher, distillation, export."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tasks.shared.lite0 import LITE0
from tasks.shared.tiny_vit import distil, export, photographs, tiny_vit
from tasks.shared.tiny_vit.crops import Crops
from tasks.shared.tiny_vit.distil import Lessons, Student, loss_of, trapezoid
from tasks.shared.tiny_vit.photographs import Photographs, flat_share, paste, prepare
from tasks.shared.tiny_vit.teacher import CHANNELS, Teacher
from tests.tolerances import assert_close
from visionlora.errors import ConfigError, DataError

SHAPE = {"grid": 4, "width": 24, "depth": 1, "heads": 3}


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two photographs, one of them twice, a drawing, a cut-out, and files that are no pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in ((1, "one"), (2, "two")):
        small = Image.fromarray(noise(12, 16, seed))
        large = np.asarray(small.resize((320, 240), Image.Resampling.BICUBIC)).astype(int)
        grain = np.random.default_rng(seed).integers(-9, 10, large.shape)
        Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
    Image.open(folder / "one.png").resize((160, 120)).save(folder / "zz-one-again.jpg")
    Image.new("RGB", (300, 200), (9, 99, 200)).save(folder / "drawing.png")
    Image.new("RGB", (300, 200), (9, 99, 200)).save(folder / "left-out.png")
    cutout = np.zeros((120, 150, 4), np.uint8)
    cutout[30:90, 40:110, :3], cutout[30:90, 40:110, 3] = noise(60, 70), 255
    Image.fromarray(cutout).save(folder / "thing.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    return folder


@pytest.fixture(scope="module")
def prepared(pictures, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("photographs")
    prepare(pictures, output, scenes=2)
    return output


def test_photographs_are_kept_once_and_things_pasted(prepared):
    names = [entry.file for entry in Photographs(prepared).entries]
    assert names == ["one.png", "two.png", "thing.png#0", "thing.png#1"]


def test_stored_pixels_are_those_of_the_picture(prepared, pictures):
    stored = Photographs(prepared)
    with Image.open(pictures / "two.png") as image:
        assert np.array_equal(stored[1], np.asarray(image))
    assert stored[2].shape == (photographs.SCENE, photographs.SCENE, 3)


def test_folder_without_photographs_is_refused(tmp_path):
    with pytest.raises(DataError, match="no photograph"):
        prepare(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="no prepared photographs"):
        Photographs(tmp_path)


def test_flat_share_counts_equal_neighbours():
    picture = np.zeros((4, 5, 3), np.uint8)
    assert flat_share(picture) == 1.0
    picture[:, 2] = 7  # differs from both of its neighbours: 2 of 4 pairs
    assert flat_share(picture) == 0.5
    assert flat_share(noise(40, 40)) < 0.01


def test_paste_shows_the_thing_and_leaves_the_ground():
    thing = np.full((30, 30, 4), 255, np.uint8)
    ground = np.zeros((500, 500, 3), np.uint8)
    scene = paste(thing, ground, np.random.default_rng(0))
    white = (scene > 250).all(-1)
    assert 30 * 30 * 0.8 < white.sum() < 46 * 46  # at most one and a half times as large
    assert ((scene < 5).all(-1) | white).mean() > 0.95


def test_crops_are_functions_of_their_number(prepared):
    one, other = Crops(Photographs(prepared), seed=3), Crops(Photographs(prepared), seed=4)
    assert np.array_equal(one.crop(7, 32), Crops(Photographs(prepared), seed=3).crop(7, 32))
    assert not np.array_equal(one.crop(7, 32), one.crop(8, 32))
    assert not np.array_equal(one.crop(7, 32), other.crop(7, 32))
    batch = one.batch([5, 7], 48)
    assert batch.shape == (2, 3, 48, 48)
    assert 0 <= batch.min() < batch.max() <= 1


def test_teacher_is_timms_network_up_to_stride_16():
    torch.manual_seed(0)
    network = timm.create_model(LITE0, features_only=True, out_indices=(3,)).eval()
    for module in network.modules():  # other than at the start, where a norm does nothing
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    whole = timm.create_model(LITE0)
    whole.load_state_dict({**whole.state_dict(), **network.state_dict()})
    pixels = torch.rand(2, 3, 64, 48)
    expected = network(pixels * 2 - 1)[0]
    assert expected.shape == (2, CHANNELS, 4, 3)
    found = Teacher(whole.state_dict())(pixels)
    assert_close(found, expected.detach().flatten(2).transpose(1, 2), factor=10)


class Brightness(nn.Module):
    """A teacher that says how bright every patch is, in 112 ways."""

    def forward(self, pixels):
        grey = nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 16).flatten(2)
        return grey.transpose(1, 2) * torch.arange(1, CHANNELS + 1)


@pytest.fixture
def lessons(prepared):
    return Lessons(Crops(Photographs(prepared)), Brightness(), 8, grid=4, small=2)


def test_lessons_take_turns_and_are_functions_of_the_step(lessons):
    small, large = lessons(0), lessons(1)
    assert small.pixels.shape == (8, 3, 32, 32)
    assert small.target.shape == (8, 4, CHANNELS)
    assert large.pixels.shape == (2, 3, 64, 64)
    assert large.target.shape == (2, 16, CHANNELS)
    assert (large.top, large.left) == (0, 0)
    again = lessons(0)
    assert torch.equal(small.pixels, again.pixels)
    assert small[2:] == again[2:]
    places = {lessons(step)[2:] for step in range(0, 40, 2)}
    assert places == {(top, left) for top in range(3) for left in range(3)}


def test_targets_are_standardised_by_channel(lessons):
    values = torch.cat([lessons(step).target.flatten(0, 1) for step in range(0, 24, 2)])
    assert values.mean(0).abs().max() < 0.3
    assert (values.std(0) - 1).abs().max() < 0.3


def test_processes_share_a_batch(lessons, monkeypatch):
    whole = lessons(0).pixels
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(lessons(0).pixels)
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)


def test_batch_that_cannot_be_cut_is_refused(prepared):
    with pytest.raises(ConfigError, match="multiple of 4"):
        Lessons(Crops(Photographs(prepared)), Brightness(), 6, grid=4, small=2)


def test_student_learns_what_the_teacher_says(lessons):
    torch.manual_seed(0)
    student = Student(**SHAPE)
    optimizer = torch.optim.AdamW(distil.groups(student, 0.05), lr=3e-3)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = loss_of(student, lessons(step % 8))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])


def test_groups_hold_every_parameter_once():
    student = Student(**SHAPE)
    matrices, rest = distil.groups(student, 0.05)
    assert len(matrices["params"]) + len(rest["params"]) == len(list(student.parameters()))
    assert rest["weight_decay"] == 0
    assert any(p is student.vit.pos_embed for p in rest["params"])
    assert all(p.ndim > 1 for p in matrices["params"])


def test_trapezoid_rises_stays_and_falls():
    rate = trapezoid(100, 10, 0.5)
    assert rate(0) == pytest.approx(0.1)
    assert rate(9) == rate(30) == rate(55) == 1
    assert rate(99) == pytest.approx(1 / 45)
    assert rate(77) == pytest.approx(23 / 45)
    assert trapezoid(100, 10, 0.0)(99) == 1


@pytest.fixture
def small_run(prepared, monkeypatch, tmp_path):
    """The whole distillation with a small student and a teacher without weights."""
    monkeypatch.setattr(distil, "Student", lambda: Student(**SHAPE))
    monkeypatch.setattr(distil, "Teacher", Brightness)
    monkeypatch.setattr(distil, "SMALL", 2)
    monkeypatch.setattr(Lessons.__init__, "__defaults__", (2,))

    def run(name, **settings):
        settings = {"batch": 8, "warmup": 2, "checkpoint_every": 2, **settings}
        config = distil.DistilConfig(photographs=prepared, output=tmp_path / name, **settings)
        return distil.distil(config), tmp_path / name

    return run


def test_resumed_run_is_the_uninterrupted_one(small_run, monkeypatch):
    _, whole = small_run("whole", steps=4, decay=0.0)
    real, asked = Lessons.__call__, []

    def stops(self, step):
        asked.append(step)
        if step == 3:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(Lessons, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        small_run("cut", steps=4, decay=0.0)
    monkeypatch.setattr(Lessons, "__call__", real)
    result, cut = small_run("cut", steps=4, decay=0.0, checkpoint_every=3, resume=True)
    assert result.resumed_from == 2
    (one, steps), (other, _) = distil.trained(whole), distil.trained(cut)
    assert steps == 4
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_another_run_starts_from_the_weights_of_the_first(small_run):
    _, first = small_run("first", steps=2)
    _, second = small_run("second", steps=1, initial=first, lr=1e-12, warmup=0)
    before, after = distil.trained(first)[0], distil.trained(second)[0]
    assert_close(after.head.weight, before.head.weight)
    assert_close(after.vit.pos_embed, before.vit.pos_embed)


def test_export_writes_a_file_of_half_precision(small_run, tmp_path, monkeypatch):
    _, run = small_run("run", steps=2)
    file = tmp_path / "out.safetensors"
    export.export(export.ExportConfig(run=run, output=file))
    folded = distil.trained(run)[0].vit.fold()
    monkeypatch.setattr(
        "tasks.shared.tiny_vit.weights.TinyViT", lambda num_classes: type(folded)(**SHAPE)
    )
    found = tiny_vit(file=file)
    pixels = torch.rand(1, 3, 64, 64)
    assert (found(pixels) - folded(pixels)).abs().max() < 0.02


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="no checkpoint"):
        distil.trained(tmp_path)


def test_script_names_its_parts(monkeypatch):
    script = Path(__file__).parents[3] / "scripts" / "make_tiny_vit.py"
    main = runpy.run_path(str(script))["main"]
    monkeypatch.setattr(sys, "argv", [str(script), "distill"])
    with pytest.raises(ConfigError, match=r"'distil'.*photographs, distil, export"):
        main()
