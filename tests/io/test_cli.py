"""`python -m visionlora`: adapter files are described and converted; mistakes are one line."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.__main__ import main
from visionlora.errors import VisionLoraError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.fc(x))


X = torch.linspace(-1, 1, 12).reshape(2, 6)


def trained(method="lora"):
    model = vl.inject(vl.freeze_base(Net(), train="head"), method, "fc", rank=2)
    with torch.no_grad():
        for _, item in vl.trainable_parameters(model):
            item.add_(0.3 * torch.randn_like(item))
    return model.eval()


@pytest.fixture
def file(tmp_path):
    return vl.save(trained(), tmp_path / "run.safetensors")


def test_inspect_describes_both_formats(file, tmp_path, capsys):
    vl.export(trained("dora"), tmp_path / "there")
    main(["inspect", str(file), str(tmp_path / "there")])
    shown = capsys.readouterr().out
    assert "method=lora" in shown
    assert "fc.weight" in shown
    assert "PEFT LORA" in shown
    assert "read here as lora or dora" in shown
    assert "use_dora=True" in shown
    assert "1 layers: fc" in shown
    assert "trained with it: head.bias, head.weight" in shown


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_a.lora_down.weight": 1, "lora_unet_a.lora_up.weight": 1}, "a Kohya LoRA"),
        ({"unet.a.lora_A.weight": 1, "unet.a.lora_B.weight": 1}, "a diffusers LoRA"),
        ({"base_model.model.a.lora_A.weight": 1}, "a PEFT LoRA without its config"),
        ({"base_model.vera_A": 1, "base_model.model.a.vera_lambda_b": 1}, "a PEFT adapter without"),
        ({"blocks.0.attn.qkv.weight": 1, "cls_token": 1}, "the weights of a whole model"),
        ({"something": 1}, "nothing known here"),
    ],
)
def test_inspect_says_what_an_unknown_file_looks_like(tensors, said, tmp_path, capsys):
    path = tmp_path / "unknown.safetensors"
    save_file({key: torch.zeros(size, 2) for key, size in tensors.items()}, path)
    main(["inspect", str(path)])
    shown = capsys.readouterr().out
    assert f"looks like {said}" in shown
    assert "(1, 2)" in shown


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"visionlora-integers": "{}"}, "an integer adapter of ours"),
        ({"visionlora": '{"format": "visionlora-generator"}'}, "a generator of adapters of ours"),
    ],
)
def test_inspect_knows_our_other_files(metadata, said, tmp_path, capsys):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata)
    main(["inspect", str(path)])
    assert f"looks like {said}" in capsys.readouterr().out


def test_convert_writes_beside_the_file_or_where_it_is_told(file, tmp_path, capsys):
    main(["convert", str(file), "--to", "peft"])
    assert (tmp_path / "run-peft" / "adapter_model.safetensors").is_file()
    main(["convert", str(tmp_path / "run-peft"), "--to", "visionlora"])
    back = tmp_path / "run-peft-visionlora.safetensors"
    assert_close(vl.load(Net(), back).eval()(X), vl.load(Net(), file).eval()(X))
    main(["convert", str(file), "--to", "lora", "--rank", "1", "--output", str(tmp_path / "one")])
    shown = capsys.readouterr().out
    assert "run-peft: written as LORA of rank 2 at 1 sites, exact" in shown
    assert "one: written as lora of rank 1 at 1 sites, relative error" in shown
    assert vl.inspect(tmp_path / "one").options[0]["rank"] == 1


def test_convert_takes_base_weights(tmp_path):
    model = trained("dora")
    file = vl.save(model, tmp_path / "dora.safetensors")
    base = tmp_path / "base.safetensors"
    save_file(Net().state_dict(), base)
    with pytest.raises(VisionLoraError, match=r"dora at fc\.weight depends on the base weights"):
        main(["convert", str(file), "--to", "lora"])
    main(["convert", str(file), "--to", "lora", "--base", str(base)])
    there = vl.load(Net(), tmp_path / "dora-lora.safetensors").eval()
    assert_close(there(X), model(X))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: inspect|convert"),
        (["inspct", "x"], "invalid choice: 'inspct'"),
        (["inspect"], "required: FILE"),
        (["inspect", "nothing.safetensors"], "no adapter file at nothing.safetensors"),
        (["convert", "nothing.safetensors", "--to", "peft"], "no adapter file at"),
        (["convert", "nothing.safetensors"], "required: --to"),
        (["convert", "x", "--to", "kohya"], "invalid choice: 'kohya'"),
        (["convert", "x", "--to", "lora", "--rank", "two"], "invalid int value: 'two'"),
        (["convert", "x", "--to", "lora", "--outptu", "y"], "unrecognized arguments: --outptu y"),
    ],
)
def test_mistakes_are_one_line(arguments, said):
    with pytest.raises(VisionLoraError) as caught:
        main(arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_file_is_not_overwritten_by_itself(file):
    before = file.read_bytes()
    with pytest.raises(VisionLoraError, match="is the file that is converted"):
        main(["convert", str(file), "--to", "lora", "--output", str(file)])
    assert file.read_bytes() == before


@pytest.mark.parametrize(("source", "to", "target"), [(0, "lora", 1), (1, "peft", 0)])
def test_a_folder_is_not_overwritten_by_its_own_file(source, to, target, tmp_path):
    vl.export(trained(), tmp_path)
    places = tmp_path, tmp_path / "adapter_model.safetensors"
    before = places[1].read_bytes()
    with pytest.raises(VisionLoraError, match="is the file that is converted"):
        main(["convert", str(places[source]), "--to", to, "--output", str(places[target])])
    assert places[1].read_bytes() == before


def test_a_file_without_tensors_looks_like_nothing(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(VisionLoraError, match="looks like nothing known here"):
        main(["inspect", str(tmp_path / "empty.safetensors")])


def test_the_process_exits_with_two_and_one_line(file, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "x" / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")
    for path, code, said in ((file, 0, "adapter scalars"), (tmp_path / "x", 2, "is a pickle")):
        done = subprocess.run(
            [sys.executable, "-m", "visionlora", "inspect", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code
        shown = done.stderr if code else done.stdout
        assert said in shown
        assert "Traceback" not in done.stderr
        assert not code or len(done.stderr.strip().splitlines()) == 1
