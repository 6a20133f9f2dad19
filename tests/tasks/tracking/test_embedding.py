"""The decoupled embedding: one frozen grid of positions, three trained types."""

import pytest
import torch

from tasks.tracking.model import TrackerShape
from tasks.tracking.model.embedding import native_positions, search_positions
from tests.tasks.tracking.lorats import SHAPE, WIDTH, batch, tracker, vit
from tests.tolerances import assert_close
from visionlora.errors import ConfigError


def test_template_takes_the_top_left_corner() -> None:
    model, (template, search, mask) = tracker(None), batch()
    embedding = model.embedding
    before = embedding.template(template, mask), embedding.search(search)
    grid = embedding.positions.data.view(4, 4, WIDTH)
    grid[2:] += 1
    grid[:, 2:] += 1
    assert torch.equal(embedding.template(template, mask), before[0])
    assert not torch.equal(embedding.search(search), before[1])
    grid[0, 0] += 1
    for after, old in zip(
        (embedding.template(template, mask), embedding.search(search)), before, strict=True
    ):
        assert_close(after[:, 0] - old[:, 0], torch.ones(2, WIDTH))
    # the second row of the template is the second row of the grid, not its fifth cell's neighbour
    grid[1, 0] += 1
    assert_close(embedding.template(template, mask)[:, 2] - before[0][:, 2], torch.ones(2, WIDTH))


def test_mask_matters_only_through_the_types() -> None:
    model, (template, search, mask) = tracker(None), batch()
    first = model(template, search, mask)
    assert not torch.equal(first.score, model(template, search, 1 - mask).score)
    model.embedding.types.data[1] = model.embedding.types.data[0]
    assert torch.equal(model(template, search, mask).score, model(template, search, 1 - mask).score)


def test_rows_of_the_types_are_background_foreground_search() -> None:
    model, (template, search, mask) = tracker(None), batch()
    embedding = model.embedding
    embedding.types.data.zero_()
    plain = embedding.template(template, mask), embedding.search(search)
    for row, value in enumerate((1.0, 2.0, 3.0)):
        embedding.types.data[row] = value
    shift = embedding.template(template, mask) - plain[0]
    assert_close(shift[:, :, 0], torch.tensor([[2.0, 2.0, 1.0, 1.0]]).expand(2, 4))
    assert_close(embedding.search(search) - plain[1], torch.full((2, 16, WIDTH), 3.0))


def test_positions_are_resampled_without_antialias() -> None:
    native = torch.randn(36, 5)
    found = search_positions(native, SHAPE)
    planes = native.T.view(1, 5, 6, 6)
    for antialias, same in ((False, True), (True, False)):
        expected = torch.nn.functional.interpolate(
            planes, (4, 4), mode="bicubic", antialias=antialias
        )
        assert torch.allclose(found, expected.view(5, 16).T, atol=1e-6) == same


def test_native_grid_is_copied() -> None:
    native = torch.randn(16, 5)
    found = search_positions(native, SHAPE)
    assert torch.equal(found, native)
    assert found.data_ptr() != native.data_ptr()


def test_native_slice_is_the_corner_of_the_native_grid() -> None:
    native = torch.arange(36.0)[:, None]
    found = search_positions(native, SHAPE, "native_slice").view(4, 4)
    assert torch.equal(found, native.view(6, 6)[:4, :4])
    with pytest.raises(ConfigError, match="only 3 x 3"):
        search_positions(torch.zeros(9, 1), SHAPE, "native_slice")
    with pytest.raises(ConfigError, match=r"resample.*got 'native'"):
        search_positions(native, SHAPE, "native")  # type: ignore[arg-type]


def test_class_position_is_left_out() -> None:
    backbone = vit(native=4)
    assert torch.equal(native_positions(backbone), backbone.pos_embed[0, 1:])
    backbone.pos_embed.data = torch.zeros(1, 19, WIDTH)
    with pytest.raises(ConfigError, match="no square grid"):
        native_positions(backbone)


def test_types_start_small_and_normal() -> None:
    from tasks.tracking.model.embedding import Embedding

    torch.manual_seed(0)
    types = Embedding(torch.nn.Identity(), torch.zeros(16, 4096), SHAPE).types
    assert float(types.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert types.requires_grad


@pytest.mark.parametrize(("template", "search"), [(100, 224), (112, 230), (280, 224), (0, 224)])
def test_impossible_shapes_are_refused(template: int, search: int) -> None:
    with pytest.raises(ConfigError, match="px"):
        TrackerShape(template, search)
