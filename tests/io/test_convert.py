"""Every method whose change is a matrix becomes plain LoRA, with its model or from its file."""

import functools

import pytest
import torch
from safetensors.torch import save_file

import visionlora as vl
from tests.contract.cases import DEFAULT_MATRICES, DEFAULTS, adapted, is_routed, pairs
from tests.contract.kinds import KINDS
from tests.tolerances import assert_close
from visionlora.errors import AdapterFileError, AdapterStateError, OutputError
from visionlora.io.peft.mapping import mapping_of
from visionlora.registry import get_method

CHOSEN = [
    kind
    for kind in KINDS
    if kind.name
    in ("linear-wide", "qkv-slices", "conv-groups", "mha-self", "mha-widths", "embedding")
]
NORMS = [kind for kind in KINDS if kind.norm]
IN_PEFT = [kind for kind in KINDS if kind.name in ("linear-tall", "mha-self", "embedding")]


@functools.cache
def base_file(kind, folder):
    path = folder / f"{kind.name}.safetensors"
    save_file({key: item.contiguous() for key, item in kind.model().state_dict().items()}, path)
    return path


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Return a function from a kind to the state dict of its base model, as a file."""
    folder = tmp_path_factory.mktemp("bases")
    return lambda kind: base_file(kind, folder)


def outputs(model, kind):
    with torch.no_grad():
        return model.eval()(*kind.inputs())


@pairs(DEFAULT_MATRICES, CHOSEN)
def test_plain_lora_is_the_same_function(config, kind, bases, tmp_path):
    """From the model, and from the file with and without the base weights."""
    model = adapted(config, kind).eval()
    expected = outputs(model, kind)
    report = vl.export(model, tmp_path / "live.safetensors", format="lora")
    assert report.error == 0
    assert_close(outputs(vl.load(kind.model(), report), kind), expected)
    native = vl.save(model, tmp_path / "native.safetensors")
    report = vl.convert(native, tmp_path / "file.safetensors", to="lora", base=bases(kind))
    assert_close(outputs(vl.load(kind.model(), report), kind), expected)
    try:
        report = vl.convert(native, tmp_path / "alone.safetensors", to="lora")
    except AdapterFileError as error:
        assert "--base FILE.safetensors" in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        assert not (tmp_path / "alone.safetensors").exists()
    else:
        assert_close(outputs(vl.load(kind.model(), report), kind), expected)


@pytest.mark.parametrize("config", [c for c in DEFAULTS if is_routed(c)], ids=lambda c: c.method)
def test_what_routes_by_input_is_refused(config, tmp_path):
    kind = CHOSEN[0]
    model = adapted(config, kind)
    for form in ("lora", "peft"):
        with pytest.raises(AdapterStateError, match="routes by input"):
            vl.export(model, tmp_path / "out", format=form)
    native = vl.save(model, tmp_path / "native.safetensors")
    with pytest.raises(AdapterFileError, match="routes by input"):
        vl.convert(native, tmp_path / "out", to="lora")
    assert [path.name for path in tmp_path.iterdir()] == ["native.safetensors"]


@pytest.mark.parametrize(
    "config", [c for c in DEFAULT_MATRICES if get_method(c.method).delta.stochastic]
)
def test_noise_of_training_is_not_exported(config, tmp_path):
    kind = CHOSEN[0]
    model = adapted(config, kind).eval()
    still = vl.export(model, tmp_path / "1.safetensors", format="lora")
    noisy = vl.export(model.train(), tmp_path / "2.safetensors", format="lora")
    assert still.path.read_bytes() == noisy.path.read_bytes()
    assert all(module.training for module in model.modules())


@pairs(DEFAULT_MATRICES, NORMS)
def test_norms_are_no_lora(config, kind, tmp_path):
    model = adapted(config, kind)
    with pytest.raises(AdapterStateError, match="changes no weight matrix"):
        vl.export(model, tmp_path / "norm.safetensors", format="lora")


@pytest.mark.parity
@pairs(DEFAULT_MATRICES, IN_PEFT)
def test_peft_computes_the_same(config, kind, bases, tmp_path):
    """In PEFT's own form of the method where it has one and the layer allows it."""
    peft = pytest.importorskip("peft")
    model = adapted(config, kind).eval()
    expected = outputs(model, kind)
    report = vl.export(model, tmp_path / "live")
    native = vl.save(model, tmp_path / "native.safetensors")
    converted = vl.convert(native, tmp_path / "file", to="peft", base=bases(kind))
    assert converted.kind == report.kind or kind.indices
    mapping = mapping_of(config.method)
    if report.kind != "LORA":
        assert report.kind == mapping.kind
    elif kind.name == "linear-tall" and mapping is not None:
        assert report.kind == mapping.kind or config.method == "rand-lora"
    for folder in (report, converted):
        there = outputs(peft.PeftModel.from_pretrained(kind.model(), folder).double(), kind)
        if kind.indices and folder is converted:  # a file does not tell the padding row
            padding = kind.inputs()[0] == 3
            there[padding] = expected[padding]
        # PEFT keeps some frozen values in float32.
        assert_close(there, expected, factor=1e4)
        assert_close(outputs(vl.load(kind.model(), folder), kind), expected, factor=1e4)


@pytest.mark.parity
def test_norms_are_tuned_in_peft_too(tmp_path):
    peft = pytest.importorskip("peft")
    (kind, *_) = NORMS
    model = adapted(vl.build_config("norm"), kind)
    report = vl.export(model, tmp_path)
    assert report.kind == "LN_TUNING"
    there = peft.PeftModel.from_pretrained(kind.model(), report).eval()
    assert_close(outputs(there, kind), outputs(model, kind))
    assert_close(outputs(vl.load(kind.model(), report), kind), outputs(model, kind))


def test_native_files_of_peft_adapters_say_the_same(bases, tmp_path):
    kind = CHOSEN[0]
    config = vl.build_config("vera", {"rank": 2})
    model = adapted(config, kind)
    folder = vl.export(model, tmp_path / "peft")
    with pytest.raises(AdapterFileError, match=r"size of layer is not in the file"):
        vl.convert(folder, tmp_path / "native.safetensors", to="visionlora")
    assert not (tmp_path / "native.safetensors").exists()
    report = vl.convert(folder, tmp_path / "native.safetensors", to="visionlora", base=bases(kind))
    assert report.kind == "vera"
    assert_close(outputs(vl.load(kind.model(), report), kind), outputs(model, kind))
    with pytest.raises(AdapterFileError, match="other base weights"):
        vl.load(kind.model(seed=1), report)


def test_a_lora_needs_no_base_and_keeps_its_values(tmp_path):
    kind = CHOSEN[0]
    model = adapted(vl.build_config("lora", {"rank": 2, "alpha": 3.0}), kind)
    native = vl.save(model, tmp_path / "native.safetensors")
    folder = vl.convert(native, tmp_path / "peft", to="peft")
    back = vl.convert(folder, tmp_path / "back.safetensors", to="visionlora")
    assert_close(outputs(vl.load(kind.model(), back), kind), outputs(model, kind))
    here, there = (vl.adapter_state_dict(item) for item in (model, vl.load(kind.model(), back)))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in here)


def test_a_wrong_base_or_target_is_refused(bases, tmp_path):
    kind, other = CHOSEN[0], CHOSEN[1]
    model = adapted(vl.build_config("dora", {"rank": 2}), kind)
    native = vl.save(model, tmp_path / "native.safetensors")
    for base, said in (
        (bases(other), "in the base weights"),
        (tmp_path / "nothing", "cannot read base weights"),
    ):
        with pytest.raises(AdapterFileError, match=said):
            vl.convert(native, tmp_path / "out.safetensors", to="lora", base=base)
    with pytest.raises(AdapterFileError, match=r"unknown format 'kohya'; allowed: 'peft'"):
        vl.convert(native, tmp_path / "out", to="kohya")
    with pytest.raises(OutputError, match="cannot write"):
        vl.convert(native, native / "x.safetensors", to="visionlora")
    assert [path.name for path in tmp_path.iterdir()] == ["native.safetensors"]
