"""Adapter files: complete or refused; a refused file leaves the model as it was."""

import copy
import json
import resource
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import visionlora as vl
from visionlora.errors import AdapterFileError, OutputError, VisionLoraError


class Net(nn.Module):
    def __init__(self, seed=0, width=8):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.attn = nn.Linear(width, 3 * width)
        self.head = nn.Linear(3 * width, 4)

    def forward(self, x):
        return self.head(self.attn(self.norm(self.first(x)).relu()))


X = torch.linspace(-1, 1, 30).reshape(5, 6)


@torch.no_grad()
def disturb(model):
    generator = torch.Generator().manual_seed(8)
    for _, item in vl.trainable_parameters(model):
        item.add_(0.3 * torch.randn(item.shape, generator=generator))
    return model


def trained(method="lora", **options):
    """Return a model with a trained adapter, a trained head and changed statistics."""
    model = vl.freeze_base(Net(), train="head")
    vl.inject(model, method, targets=["first", "attn[q,v]"], rank=2, **options)
    disturb(model).train()(X + 1)
    return model.eval()


@pytest.fixture
def path(tmp_path):
    return vl.save(trained(), tmp_path / "adapter.safetensors")


def state(model):
    return (
        {key: item.clone() for key, item in model.state_dict().items()},
        {name: type(module) for name, module in model.named_modules()},
        {name: item.requires_grad for name, item in model.named_parameters()},
        {name: id(item) for name, item in model.named_parameters()},
        {name: sorted(vars(module)) for name, module in model.named_modules()},
    )


def refuses(model, path, said="", error=AdapterFileError, **options):
    """Check that loading is refused in one line, and that the model stays as it was."""
    before = state(model)
    with pytest.raises(error) as caught:
        vl.load(model, path, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    after = state(model)
    assert all(torch.equal(after[0][key], item) for key, item in before[0].items())
    assert list(after[0]) == list(before[0])
    assert after[1:] == before[1:]


def rewrite(path, change_tensors=None, change_header=None, metadata=None):
    """Write the file again with some part of it changed."""
    with safe_open(path, "pt") as stream:
        header = json.loads(stream.metadata()["visionlora"])
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    if change_tensors:
        change_tensors(tensors)
    if change_header:
        change_header(header)
    text = {"visionlora": json.dumps(header)} if metadata is None else metadata
    path.write_bytes(safetensors.torch.save(tensors, text))
    return path


@pytest.mark.parametrize("method", ["lora", "lora-fa", "block-lora", "dora", "vera"])
def test_heads_and_statistics_travel_with_the_adapter(method, tmp_path):
    options = {"dropout": 0.0} if method == "block-lora" else {}
    model = trained(method, **options)
    path = vl.save(model, tmp_path / "deep" / "er" / "a.safetensors")
    keys = set(safetensors.torch.load_file(path))
    assert {"base.head.weight", "base.head.bias", "base.norm.running_mean"} <= keys
    assert not any(key.startswith("frozen.") for key in keys)
    assert "base.norm.weight" not in keys
    fresh = vl.load(Net(), path).eval()
    assert torch.equal(fresh(X), model(X))
    # a loaded adapter is saved, and ejected, like the one it came from
    again = vl.save(fresh, tmp_path / "again.safetensors")
    assert torch.equal(vl.load(Net(), again).eval()(X), model(X))
    vl.eject(fresh)
    assert torch.equal(fresh.norm.running_mean, Net().norm.running_mean)
    assert all(item.requires_grad for item in fresh.parameters())


def test_saving_does_not_change_the_model(tmp_path):
    model = trained()
    before = state(model)
    vl.save(model, tmp_path / "a.safetensors")
    after = state(model)
    assert all(torch.equal(after[0][key], item) for key, item in before[0].items())
    assert after[1:] == before[1:]


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    one = vl.save(trained(), tmp_path / "1.safetensors").read_bytes()
    assert vl.save(trained(), tmp_path / "2.safetensors").read_bytes() == one


def test_an_adapter_loads_under_another_name_beside_the_first(path):
    model = vl.load(Net(), path, name="a").eval()
    single = model(X)
    vl.load(model, path, name="b")
    assert not torch.equal(model(X), single)
    assert torch.equal(vl.use(model, "b")(X), single)


def test_every_truncation_is_refused(path):
    data = path.read_bytes()
    for cut in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 100, len(data) - 1):
        path.write_bytes(data[:cut])
        refuses(Net(), path, "truncated")
    path.write_bytes(data + b"extra")
    refuses(Net(), path)


@pytest.mark.parametrize("data", [b"not a tensor file at all", b"\x80\x04K\x01.", b"\xff" * 64])
def test_other_files_are_refused(path, data):
    path.write_bytes(data)
    refuses(Net(), path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    refuses(Net(), tmp_path / "nothing.safetensors", "no adapter file")
    refuses(Net(), tmp_path, "no adapter file")


def test_a_file_of_another_tool_is_refused(path):
    tensors = {"base_model.model.first.lora_A.weight": torch.zeros(2, 6)}
    for metadata in (None, {"format": "pt"}):
        path.write_bytes(safetensors.torch.save(tensors, metadata))
        refuses(Net(), path, "another tool")


KEY = "adapter.first.weight.A"


def shorten(tensors):
    tensors[KEY] = tensors[KEY][:1].clone()


def transpose(tensors):
    tensors[KEY] = tensors[KEY].t().contiguous()


def poison(value):
    def change(tensors):
        tensors[KEY][0, 0] = value

    return change


def misspell(tensors):
    tensors["adapter.frist.weight.A"] = tensors.pop(KEY)


def add(tensors):
    tensors["adapter.first.weight.C"] = torch.zeros(1)


def add_base(tensors):
    tensors["base.hed.weight"] = torch.zeros(1)


def drop(tensors):
    del tensors[KEY]


def grow_head(tensors):
    tensors["base.head.weight"] = torch.zeros(9, 24)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shorten, "shape"),
        (transpose, "shape"),
        (grow_head, "shape"),
        (poison(float("nan")), "NaN"),
        (poison(float("inf")), "NaN"),
        (misspell, "unknown tensor"),
        (add, "unknown tensor"),
        (add_base, "unknown tensor"),
        (drop, "missing tensor"),
    ],
)
def test_wrong_tensors_are_refused_by_name(path, change, said):
    rewrite(path, change_tensors=change)
    refuses(Net(), path, said)
    refuses(trained(), path, said)  # where the adapter is there already


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"text"', "{}", '{"format": "visionlora-adapter"}']
)
def test_a_damaged_description_is_refused(path, text):
    rewrite(path, metadata={"visionlora": text})
    refuses(Net(), path, "damaged")


def paths_of(node, at=()):
    yield at
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from paths_of(value, (*at, key))


def replaced(header, at, value):
    header = copy.deepcopy(header)
    node = header
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = value
    return header


def test_no_description_crashes_load_or_leaves_a_half_changed_model(path):
    """Every value of the description is replaced by every kind of wrong value."""
    with safe_open(path, "pt") as stream:
        header = json.loads(stream.metadata()["visionlora"])
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    model = Net()
    before = state(model)
    for at in paths_of(header):
        for value in (None, -1, 10**6, 0.5, "x", [], {}, [[]], True):
            if not at or at == ("sites", 0, 0, "in_features"):
                continue
            text = json.dumps(replaced(header, at, value))
            path.write_bytes(safetensors.torch.save(tensors, {"visionlora": text}))
            try:
                vl.load(model, path)
            except VisionLoraError as error:
                assert "\n" not in str(error)  # noqa: PT017
                after = state(model)
                assert after[1:] == before[1:], (at, value)
            else:  # a value that does no harm, such as another dropout
                model = Net()
                before = state(model)


def test_a_newer_version_is_refused(path):
    rewrite(path, change_header=lambda header: header.update(version=99))
    refuses(Net(), path, "version 99")


def test_an_unknown_method_or_option_is_refused(path):
    rewrite(path, change_header=lambda header: header["configs"][0].update(method="lora-99"))
    refuses(Net(), path)
    rewrite(path, change_header=lambda header: header["configs"][0].update(method="lora", zap=1))
    refuses(Net(), path, "zap")


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.frist = nn.Linear(6, 8)
        self.attn = nn.Linear(8, 24)


class Convolutional(Net):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(6, 8, 1)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (Other, "'frist'"),
        (lambda: Net(width=4), "4 x 6 here and 8 x 6"),
        (lambda: Net(seed=1), "other base weights"),
        (lambda: nn.Sequential(nn.Linear(6, 8)), "no layer"),
        (Convolutional, "8 x 6 (conv, 1 groups) here and 8 x 6 (linear, 1 groups)"),
    ],
)
def test_a_wrong_base_model_is_refused(path, build, said):
    refuses(build(), path, said)


def test_other_base_weights_are_accepted_on_request_and_after_a_cast(path):
    model = vl.load(Net(seed=1), path, check_base=False)
    assert torch.equal(
        model.first.adapters["default"]["weight"].A, safetensors.torch.load_file(path)[KEY]
    )
    vl.load(Net().to(torch.bfloat16), path)
    refuses(Net(width=4), path, "4 x 6", check_base=False)


def test_options_of_an_adapter_that_is_there_must_agree(path):
    model = vl.inject(Net(), "lora", targets=["first", "attn[q,v]"], rank=2, alpha=64.0)
    refuses(model, path, "scale")
    model = vl.inject(Net(), "lora", targets=["first", "attn[q,v]"], rank=2, alpha=2.0, seed=9)
    assert torch.equal(vl.load(model, path).eval()(X), trained()(X))
    model = vl.inject(Net(), "lora", targets="first", rank=2)
    refuses(model, path, "unknown tensor")


@pytest.mark.parametrize("method", ["lora-fa", "vera"])
def test_seeded_tensors_are_compared_or_carried(method, tmp_path):
    model = trained(method, seed=3)
    path = vl.save(model, tmp_path / "seeded.safetensors")
    other = vl.inject(Net(), method, targets=["first", "attn[q,v]"], rank=2, seed=4)
    refuses(other, path, "seeded tensor")

    def spoil(header):
        key = next(iter(header["frozen"]))
        header["frozen"][key][0] += 0.5

    rewrite(path, change_header=spoil)
    refuses(Net(), path, "seeded tensor")
    carried = vl.save(model, tmp_path / "carried.safetensors", frozen=True)
    rewrite(carried, change_header=spoil)  # the stored tensor counts
    assert torch.equal(vl.load(other, carried).eval()(X), model(X))


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    model = trained()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(AdapterFileError, match=r"head\.bias"):
        vl.save(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "a.safetensors", tmp_path):
        with pytest.raises(OutputError, match="cannot write"):
            vl.save(trained(), target)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


FULL = """
import resource, sys
sys.path[:0] = sys.argv[2:4]
import test_native, visionlora as vl
model = test_native.trained()
resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
try:
    vl.save(model, sys.argv[1])
except vl.errors.OutputError as error:
    print(error)
    sys.exit(3)
"""


def test_a_full_disk_keeps_the_old_file(path):
    old = path.read_bytes()
    assert len(old) > 512
    here = __file__.rsplit("/", 1)[0]
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), here, f"{here}/../.."],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "cannot write" in done.stdout
    assert path.read_bytes() == old
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 512


def test_an_adapter_dictionary_holds_what_cannot_be_drawn_again():
    model = disturbed_pissa(seed=1)
    other = disturbed_pissa(seed=2)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert not torch.equal(other(x), model(x))
    vl.load_adapter_state_dict(other, vl.adapter_state_dict(model))
    assert torch.equal(other(x), model(x))


def disturbed_pissa(seed):
    """The same base weight, and a trained pair and constant pair of its own."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(36.0).reshape(6, 6).sin())
        model[0].bias.zero_()
    vl.inject(model, "pissa", targets="0", rank=2)
    delta = model[0].adapters["default"]["weight"]
    with torch.no_grad():
        for item in (delta.A, delta.B, delta.A0, delta.B0):
            item.add_(torch.randn(item.shape, generator=generator, dtype=item.dtype))
    return model
