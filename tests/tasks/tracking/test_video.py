"""Following an object in one's own video: what is read, drawn and kept."""

import csv
import os
import signal

import cv2
import numpy as np
import pytest
from PIL import Image

from tasks.tracking.video.drawing import GREEN, annotate
from tasks.tracking.video.run import VideoConfig, parse_box, run
from tasks.tracking.video.sources import open_source
from tests.tasks.tracking.oracle import Oracle, path_of, picture, sequence
from visionlora.errors import ConfigError, DataError, OutputError

BOX = "60,45,24,20"


def write_video(path, count=6, fps=12.0):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (160, 120))
    for box in path_of(count):
        writer.write(np.ascontiguousarray(picture(box)[..., ::-1]))
    writer.release()
    return path


def frames_of(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


def table(folder):
    with (folder / "boxes.csv").open() as stream:
        return list(csv.DictReader(stream))


def config(source, output, **options):
    return VideoConfig(source=str(source), box=BOX, output=str(output), **options)


def test_a_folder_of_images_becomes_a_video_and_a_table(tmp_path, capsys):
    sequence(tmp_path, "clip", 5)
    found = run(config(tmp_path / "clip", tmp_path / "out"), Oracle())
    frames, fps = frames_of(tmp_path / "out" / "video.mp4")
    assert found["frames"] == len(frames) == 5
    assert frames[0].shape == (120, 160, 3)
    assert fps == 30
    rows = table(tmp_path / "out")
    assert list(rows[0]) == ["frame", "x", "y", "w", "h", "score"]
    assert [row["frame"] for row in rows] == ["0", "1", "2", "3", "4"]
    boxes = np.array([[float(row[key]) for key in "xywh"] for row in rows])
    np.testing.assert_allclose(boxes, path_of(5), atol=0.1)
    assert rows[0]["score"] == "1.0000"
    assert rows[1]["score"] == "0.9000"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["boxes.csv", "video.mp4"]
    assert "frames/s in the tracker" in capsys.readouterr().out


def test_a_video_file_keeps_its_length_and_speed(tmp_path):
    source = write_video(tmp_path / "clip.mp4", count=7, fps=12.0)
    run(config(source, tmp_path / "out"), Oracle())
    frames, fps = frames_of(tmp_path / "out" / "video.mp4")
    assert (len(frames), fps) == (7, 12.0)
    x = [float(row["x"]) for row in table(tmp_path / "out")]
    np.testing.assert_allclose(x, path_of(7)[:, 0], atol=1.5)  # the codec loses some


def test_the_box_is_drawn_around_the_object(tmp_path):
    sequence(tmp_path, "clip", 2)
    run(config(tmp_path / "clip", tmp_path / "out"), Oracle())
    frames, _ = frames_of(tmp_path / "out" / "video.mp4")
    border, middle = frames[0][45, 72].astype(int), frames[0][55, 72].astype(int)
    assert border[1] > border[0]  # green on the edge of the box
    assert middle[0] > 200  # red inside


def test_lines_cover_the_first_and_last_pixel_of_the_box():
    image = np.zeros((100, 100, 3), np.uint8)
    drawn = annotate(image, np.array([20.0, 30, 40, 50]), "")
    green = np.argwhere((drawn == GREEN).all(-1))
    assert green.min(0).tolist() == [30, 20]
    assert green.max(0).tolist() == [79, 59]
    assert not image.any()


def test_a_lost_object_gets_no_box():
    image = np.zeros((100, 100, 3), np.uint8)
    drawn = annotate(image, np.array([50.0, 60, 0, 0]), "")
    assert not drawn[50:].any()
    assert drawn[:30].any()


def test_frames_stops_early(tmp_path):
    sequence(tmp_path, "clip", 5)
    assert run(config(tmp_path / "clip", tmp_path / "out", frames=3), Oracle())["frames"] == 3
    assert len(table(tmp_path / "out")) == 3


class Interrupting(Oracle):
    """A tracker during whose fourth frame someone presses Ctrl-C."""

    count = 0

    def track(self, image):
        self.count += 1
        if self.count == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().track(image)


def test_ctrl_c_keeps_what_is_written(tmp_path):
    sequence(tmp_path, "clip", 8)
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path / "clip", tmp_path / "out"), Interrupting())
    assert len(table(tmp_path / "out")) == 4
    assert len(frames_of(tmp_path / "out" / "video.mp4")[0]) == 4


def test_frames_before_a_damaged_one_are_kept(tmp_path):
    video = sequence(tmp_path, "clip", 5)
    video.frames[3].write_bytes(b"")
    with pytest.raises(DataError, match=r"00000004\.png"):
        run(config(tmp_path / "clip", tmp_path / "out"), Oracle())
    assert len(table(tmp_path / "out")) == 3
    assert len(frames_of(tmp_path / "out" / "video.mp4")[0]) == 3


def test_frames_of_another_size_are_refused(tmp_path):
    video = sequence(tmp_path, "clip", 3)
    Image.new("RGB", (80, 60)).save(video.frames[1])
    with pytest.raises(DataError, match="80 x 60 pixels, the first one 160 x 120"):
        run(config(tmp_path / "clip", tmp_path / "out"), Oracle())


def test_a_bad_box_leaves_nothing_behind(tmp_path):
    sequence(tmp_path, "clip", 3)
    settings = VideoConfig(
        source=str(tmp_path / "clip"), box="500,0,5,5", output=str(tmp_path / "out")
    )
    with pytest.raises(DataError, match="outside the image of 160 x 120"):
        run(settings, Oracle())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "", "1,2,3,4,5"])
def test_a_box_is_four_numbers(text):
    with pytest.raises(ConfigError, match="four numbers x,y,w,h"):
        VideoConfig(source="x", box=text)


def test_boxes_may_be_separated_by_spaces():
    assert parse_box("1, 2.5 3,4") == (1.0, 2.5, 3.0, 4.0)


def test_what_is_no_video_is_said_in_one_line(tmp_path, capfd):
    (tmp_path / "notes.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(DataError, match=r"cannot decode .*notes.mp4"):
        open_source(str(tmp_path / "notes.mp4"))
    with pytest.raises(DataError, match="did you mean 'notes"):
        open_source(str(tmp_path / "note.mp4"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in"):
        open_source(str(tmp_path / "empty"))
    Image.new("RGB", (8, 8)).save(tmp_path / "00000001.jpg")
    with pytest.raises(DataError, match="single image"):
        open_source(str(tmp_path / "00000001.jpg"))
    with pytest.raises(DataError, match="webcam 97 gives no picture"):
        open_source("97")
    assert capfd.readouterr().err == ""


def test_a_truncated_video_is_followed_as_far_as_it_goes(tmp_path, capsys):
    source = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"MJPG"), 10, (160, 120))
    for box in path_of(30):
        writer.write(np.ascontiguousarray(picture(box)[..., ::-1]))
    writer.release()
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    count = run(config(source, tmp_path / "out"), Oracle())["frames"]
    assert 0 < count < 30
    assert len(table(tmp_path / "out")) == count
    assert "is it damaged?" in capsys.readouterr().out


def test_a_folder_of_a_benchmark_is_read_by_its_images(tmp_path):
    sequence(tmp_path / "car", "img", 3)
    source = open_source(str(tmp_path / "car"))
    assert (source.name, source.count, len(list(source.frames))) == ("car", 3, 3)


def test_an_output_that_cannot_be_written_is_said(tmp_path):
    sequence(tmp_path, "clip", 2)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        run(config(tmp_path / "clip", tmp_path / "out"), Oracle())
