"""Which frames make pairs, and how often."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tasks.tracking.images import read_image
from tasks.tracking.model.variants import TrackerShape
from tasks.tracking.sequences.sequence import Track
from tasks.tracking.training.data import load_source
from tasks.tracking.training.pairs import MAX_GAP, Mixture, Pair, TrackPairs, View, draw_frames
from tests.tasks.tracking.training_toy import write_data, write_sequence
from visionlora.errors import ConfigError, DataError

SHAPE = TrackerShape(template_px=28, search_px=56)


def track(name="a", exists=(True,) * 5, folder=None):
    exists = np.array(exists)
    boxes = np.where(exists[:, None], [1.0, 2.0, 3.0, 4.0], np.nan)
    folder = Path(folder or name)
    frames = tuple(folder / f"{i}.png" for i in range(len(exists)))
    return Track(name, frames, boxes, exists)


class Named:
    """A source that says which one was drawn."""

    notes = ()

    def __init__(self, name):
        self.name = name

    def pair(self, rng):
        view = View(self.name, None)
        return Pair(view, view)


def within(count, draws, share):
    """Whether a count is within five standard deviations of what its share makes likely."""
    return abs(count - draws * share) < 5 * np.sqrt(draws * share * (1 - share))


def test_search_is_another_existing_frame_within_the_gap_in_both_directions():
    rng = np.random.default_rng(0)
    shown = np.flatnonzero(rng.random(400) < 0.5)
    gaps = []
    for _ in range(2000):
        z, x = draw_frames(shown, rng)
        assert {z, x} <= set(shown)
        gaps.append(x - z)
    assert 0 not in gaps
    assert max(map(abs, gaps)) == MAX_GAP
    assert within(sum(gap > 0 for gap in gaps), 2000, 0.5)


def test_template_and_search_are_uniform_over_their_frames():
    rng = np.random.default_rng(1)
    draws = Counter(draw_frames(np.array([3, 50, 149, 160]), rng) for _ in range(6000))
    # From 3 only 50 is near; 50 has three, one of which is 99 away, but not 160.
    expected = {(3, 50): 1 / 4, (50, 3): 1 / 8, (50, 149): 1 / 8}
    expected |= {(149, 50): 1 / 8, (149, 160): 1 / 8, (160, 149): 1 / 4}
    assert set(draws) == set(expected)
    assert all(within(draws[pair], 6000, share) for pair, share in expected.items())


@pytest.mark.parametrize("shown", [[0], [0, 101], [7, 300, 900]])
def test_a_frame_without_neighbours_pairs_with_itself(shown):
    rng = np.random.default_rng(0)
    for _ in range(20):
        z, x = draw_frames(np.array(shown), rng)
        assert z == x


def test_frames_without_the_object_are_never_drawn():
    source = TrackPairs("own", [track(exists=[False, True, False, True, False])])
    rng = np.random.default_rng(0)
    assert {frozenset(source.draw(rng)[1:]) for _ in range(50)} == {frozenset({1, 3})}


def test_sequences_are_drawn_equally_whatever_their_length_and_number_of_objects():
    still = [track(f"object-{i}", [True], folder="photo") for i in range(3)]
    source = TrackPairs("own", [track("long", [True] * 500), track("short", [True] * 2), *still])
    rng = np.random.default_rng(0)
    drawn = Counter(source.draw(rng)[0].name for _ in range(3000))
    assert within(drawn["long"], 3000, 1 / 3)
    assert within(drawn["short"], 3000, 1 / 3)
    assert all(within(drawn[f"object-{i}"], 3000, 1 / 9) for i in range(3))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_data_sets_are_drawn_by_weight_and_equally_without(weights):
    mixture = Mixture([Named(name) for name in "abc"], weights)
    rng = np.random.default_rng(0)
    drawn = Counter(mixture.pair(rng).template.image for _ in range(3000))
    shares = np.array(weights or [1, 1, 1]) / sum(weights or [1, 1, 1])
    assert all(within(drawn[name], 3000, share) for name, share in zip("abc", shares, strict=True))


def test_a_pair_holds_the_frames_and_their_boxes_as_corners(tmp_path):
    boxes = write_sequence(tmp_path / "video")
    (source,) = load_source([f"folder:{tmp_path}"], ".", None, SHAPE).sources
    drawn, z, x = source.draw(np.random.default_rng(3))
    pair = source.pair(np.random.default_rng(3))
    for view, frame in ((pair.template, z), (pair.search, x)):
        np.testing.assert_array_equal(view.image, read_image(drawn.frames[frame]))
        corner = boxes[frame, :2]
        np.testing.assert_allclose(view.box, [*corner, *(corner + boxes[frame, 2:])])


def test_tracks_without_a_box_are_left_out_and_said():
    source = TrackPairs("own", [track("a"), track("b", [False] * 4)])
    assert [item.name for (item,) in source.sequences] == ["a"]
    assert source.notes == ("own: 1 sequences", "own: 1 tracks without a box left out")


@pytest.mark.parametrize(
    ("tracks", "message"),
    [([], "it has no tracks"), ([track(exists=[False])], "none of its 1 tracks has a box")],
)
def test_nothing_to_train_on_is_refused(tracks, message):
    with pytest.raises(DataError, match=f"nothing to train on in own: {message}"):
        TrackPairs("own", tracks)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")]])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(DataError, match="one positive number for each of a, b"):
        Mixture([Named("a"), Named("b")], weights)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lasott", "unknown training data 'lasott' .did you mean 'lasot'"),
        ("folder", "--data folder needs a folder, as in folder:PATH"),
    ],
)
def test_a_wrong_name_of_a_data_set_is_answered_with_the_nearest(spec, message):
    with pytest.raises(ConfigError, match=message):
        load_source([spec], ".", None, SHAPE)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_source(["lasot"], tmp_path, None, SHAPE)
    with pytest.raises(DataError, match="no folder of photographs"):
        load_source([f"synthetic:{tmp_path / 'none'}"], ".", None, SHAPE)


def test_several_sources_are_mixed(tmp_path):
    mixture = load_source([write_data(tmp_path)] * 2, ".", [3.0, 1.0], SHAPE)
    assert [source.name for source in mixture.sources] == ["folder", "folder"]
    np.testing.assert_allclose(mixture.shares, [0.75, 0.25])
