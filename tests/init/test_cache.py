"""Statistics are gathered once, and read again only where nothing has changed."""

import json
import logging
import pickle

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import visionlora as vl
from tests.init.looking import tower, vectors
from visionlora.errors import ConfigError, OutputError
from visionlora.init.base import Components
from visionlora.init.stats import collect

ALL = {"gradient", "covariance", "components"}
CALLS = []


def counting(model, batch):
    """A loss that tells how often it is asked; the list is a global, so it is not identity."""
    CALLS.append(len(batch[0]))
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def look(tmp_path):
    """Return statistics and how many batches the model ran on."""

    def run(
        model=None, batches=None, loss_fn=counting, path=tmp_path / "stats.safetensors", **more
    ):
        CALLS.clear()
        options = {"needs": ALL, "components": 2, **more}
        model = tower() if model is None else model
        batches = vectors() if batches is None else batches
        return collect(model, batches, loss_fn, cache=path, **options), len(CALLS)

    torch.default_generator.manual_seed(0)
    return run


def values(stats):
    """All tensors by name."""
    result = {}
    for name, site in stats.sites.items():
        for kind, value in vars(site).items():
            parts = vars(value) if isinstance(value, Components) else {"": value}
            result |= {f"{name}.{kind}.{part}": tensor for part, tensor in parts.items()}
    return result


def assert_equal(one, other):
    one_values, other_values = values(one), values(other)
    assert one_values.keys() == other_values.keys()
    assert all(torch.equal(one_values[key], other_values[key]) for key in one_values)
    assert (one.loss, one.batches, one.samples) == (other.loss, other.batches, other.samples)


def fresh():
    torch.default_generator.manual_seed(0)
    return tower()


def test_the_second_pass_reads_the_first_bit_for_bit(look):
    first, ran = look(fresh())
    assert (ran, first.cached) == (3, False)
    second, ran = look(fresh())
    assert (ran, second.cached) == (0, True)
    assert_equal(first, second)


def test_the_adapter_and_the_form_of_the_data_are_not_part_of_the_key(look):
    look(fresh())
    model = fresh()
    for _, parameter in vl.trainable_parameters(model):
        parameter.data.normal_()
    assert look(model)[0].cached
    assert look(fresh(), iter(vectors()), count=3)[0].cached


def other_loss(model, batch):
    CALLS.append(len(batch[0]))
    return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)


def smoothed(amount):
    return lambda model, batch: nn.functional.cross_entropy(
        model(batch[0]), batch[1], label_smoothing=amount
    )


def changed(name):
    model = fresh()
    model.get_parameter(name).data.view(-1)[0] += 1e-9
    return model


def with_statistics():
    model = fresh()
    model.norm.running_mean[0] += 1e-9
    return model


def with_label(batches):
    batches[2][1][0] = 2 - batches[2][1][0]
    return batches


@pytest.mark.parametrize(
    "change",
    [
        {"model": lambda: changed("head.weight")},
        {"model": lambda: changed("norm.bias")},  # not adapted, but the gradient depends on it
        {"model": with_statistics},
        {"batches": lambda: vectors(seed=1)},
        {"batches": lambda: with_label(vectors())},
        {"batches": lambda: vectors()[:2]},
        {"loss_fn": lambda: other_loss},
        {"needs": lambda: {"gradient", "covariance"}},
        {"components": lambda: 3},
        {"sketch": lambda: 1},
        {"samples": lambda: lambda batch: 1},
    ],
)
def test_whatever_changes_a_number_is_collected_again(look, caplog, change):
    look(fresh())
    assert not caplog.records
    options = {"model": fresh(), **{key: make() for key, make in change.items()}}
    found, _ = look(**options)
    assert not found.cached
    assert "other data or other options" in caplog.text
    caplog.clear()
    options |= {key: make() for key, make in change.items()}
    assert look(**options)[0].cached
    assert not caplog.records


def test_what_a_loss_encloses_is_part_of_the_key(look):
    assert not look(fresh(), loss_fn=smoothed(0.1))[0].cached
    assert look(fresh(), loss_fn=smoothed(0.1))[0].cached
    assert not look(fresh(), loss_fn=smoothed(0.2))[0].cached


def test_a_loss_may_enclose_the_model(look):
    model = fresh()

    def loss_fn(_, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    first, _ = look(model, loss_fn=loss_fn)
    for _, parameter in vl.trainable_parameters(model):
        parameter.data.normal_()
    assert look(model, loss_fn=loss_fn)[0].cached
    assert not first.cached


# -- files that cannot be used


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def garbage(path):
    path.write_bytes(b"no safetensors file")


def pickled(path):
    path.write_bytes(pickle.dumps(Trap()))


class Trap:
    """Fails the test when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def rewrite(path, change):
    """Change the tensors or the metadata of a sound file."""
    with safetensors.safe_open(path, "pt") as stream:
        metadata = stream.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def with_nan(path):
    rewrite(path, lambda tensors, _: tensors["conv.weight.gradient"].fill_(float("nan")))


def without_tensor(path):
    rewrite(path, lambda tensors, _: tensors.pop("conv.weight.gradient"))


def misshapen(path):
    rewrite(path, lambda tensors, _: tensors.update({"head.weight.gradient": torch.ones(2, 2)}))


def without_site(path):
    def change(_, metadata):
        layout = json.loads(metadata["layout"])
        del layout["conv.weight"]
        metadata["layout"] = json.dumps(layout)

    rewrite(path, change)


def without_need(path):
    def change(_, metadata):
        layout = json.loads(metadata["layout"])
        del layout["conv.weight"]["covariance"]
        metadata["layout"] = json.dumps(layout)

    rewrite(path, change)


def with_bad_layout(path):
    rewrite(path, lambda _, metadata: metadata.update(layout="[1, 2"))


def with_bad_figures(path):
    rewrite(path, lambda _, metadata: metadata.update(figures='{"loss": null}'))


def without_figures(path):
    rewrite(path, lambda _, metadata: metadata.update(figures='{"loss": 1.0}'))


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        garbage,
        pickled,
        with_nan,
        without_tensor,
        misshapen,
        without_site,
        without_need,
        with_bad_layout,
        with_bad_figures,
        without_figures,
    ],
)
def test_a_damaged_file_is_collected_again_and_replaced(look, tmp_path, caplog, damage):
    path = tmp_path / "stats.safetensors"
    expected, _ = look(fresh())
    damage(path)
    with caplog.at_level(logging.WARNING, "visionlora"):
        found, ran = look(fresh())
    assert ran == 3
    assert "is damaged; collecting again" in caplog.text
    assert_equal(found, expected)
    assert look(fresh())[0].cached


def test_a_file_of_something_else_is_never_replaced(look, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="of something else: it is not replaced"):
        look(fresh(), path=path)
    assert path.read_bytes() == before
    assert CALLS == []
    folder, text = tmp_path / "folder.safetensors", tmp_path / "notes.txt"
    folder.mkdir()
    text.write_text("notes")
    with pytest.raises(OutputError, match="is a folder"):
        look(fresh(), path=folder)
    with pytest.raises(OutputError, match=r"must end in .safetensors"):
        look(fresh(), path=text)
    assert text.read_text() == "notes"


def test_a_failed_pass_keeps_the_old_file(look, tmp_path):
    path = tmp_path / "stats.safetensors"
    look(fresh())
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="one scalar tensor"):
        look(fresh(), loss_fn=lambda model, batch: model(batch[0]))
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_batches_that_cannot_be_told_apart_are_refused(look):
    batches = [(*batch, object()) for batch in vectors()]
    with pytest.raises(ConfigError, match="tell one object from another"):
        look(fresh(), batches)
    labelled = [
        (*batch, {"name": "cat", "tags": ["a", None], "at": (1, 2.5)}) for batch in vectors()
    ]
    assert not look(fresh(), labelled)[0].cached
    assert look(fresh(), labelled)[0].cached


def test_a_cached_start_is_the_same_start(tmp_path):
    path = tmp_path / "stats.safetensors"
    models = [fresh(), fresh()]
    for model in models:
        vl.initialise(model, "corda", vectors(), counting, cache=path)
    one, other = (vl.adapter_state_dict(model) for model in models)
    assert all(torch.equal(one[key], other[key]) for key in one)
