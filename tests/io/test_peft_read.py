"""Adapters that PEFT saved are live here: the same outputs, trainable, and written back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import AdapterFileError, AdapterStateError, VisionLoraError
from visionlora.io.peft.config import targeted
from visionlora.record import hosts_of

peft = pytest.importorskip("peft")
check_target_module_exists = pytest.importorskip(
    "peft.tuners.tuners_utils"
).check_target_module_exists
pytestmark = pytest.mark.parity


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.norm = nn.LayerNorm(12)
        self.fc = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 8)
        self.fc3 = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, index):
        x = self.conv(self.table(index).transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)
        x = self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc(self.norm(x))))))
        return self.head(x).mean(1)


INDEX = torch.arange(30).reshape(3, 10) % 11
LINEAR = ["fc", "fc2", "fc3"]
EVERY = [*LINEAR, "conv", "table"]

CASES = {
    "lora": (peft.LoraConfig, {"r": 2, "lora_alpha": 3}, EVERY),
    "rslora": (peft.LoraConfig, {"r": 4, "use_rslora": True}, EVERY),
    "lora, patterns": (
        peft.LoraConfig,
        {"r": 2, "rank_pattern": {"fc": 3}, "alpha_pattern": {"^fc": 5, "conv": 1}},
        EVERY,
    ),
    "dora": (peft.LoraConfig, {"r": 2, "use_dora": True}, EVERY),
    "vera": (peft.VeraConfig, {"r": 3}, LINEAR),
    "vera, drawn again": (peft.VeraConfig, {"r": 3, "save_projection": False}, LINEAR),
    "randlora": (peft.RandLoraConfig, {"r": 3, "randlora_alpha": 6}, LINEAR),
    "loha": (peft.LoHaConfig, {"r": 2, "alpha": 3, "rank_pattern": {"fc": 1}}, EVERY[:-1]),
    "loha, cores": (peft.LoHaConfig, {"r": 2, "use_effective_conv2d": True}, EVERY[:-1]),
    "lokr": (peft.LoKrConfig, {"r": 1, "alpha": 3}, EVERY[:-1]),
    "lokr, whole": (peft.LoKrConfig, {"r": 8, "alpha": 3}, EVERY[:-1]),
    "lokr, factor": (peft.LoKrConfig, {"r": 1, "decompose_factor": 2}, EVERY[:-1]),
    "lokr, cores": (
        peft.LoKrConfig,
        {"r": 1, "decompose_both": True, "use_effective_conv2d": True},
        EVERY[:-1],
    ),
    "hira": (peft.HiraConfig, {"r": 2}, EVERY),
    "miss": (peft.MissConfig, {"r": 4}, LINEAR),
    "miss, bat": (peft.MissConfig, {"r": 4, "init_weights": "bat"}, LINEAR),
    "miss, mini": (peft.MissConfig, {"r": 4, "mini_r": 2, "init_weights": "mini"}, LINEAR),
    "tinylora": (peft.TinyLoraConfig, {"r": 2, "u": 3}, [*LINEAR, "table"]),
    "tinylora, tied": (
        peft.TinyLoraConfig,
        {"r": 2, "u": 3, "weight_tying": 0.5, "save_projection": False},
        [*LINEAR, "table"],
    ),
    "fourierft": (
        peft.FourierFTConfig,
        {"n_frequency": 9, "n_frequency_pattern": {"fc": 7}},
        LINEAR,
    ),
    "oft": (peft.OFTConfig, {"r": 0, "oft_block_size": 4}, [*LINEAR, "table"]),
    "oft, exact": (
        peft.OFTConfig,
        {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False, "block_share": True},
        LINEAR,
    ),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4, "boft_n_butterfly_factor": 1}, EVERY[:-1]),
    "adalora": (peft.AdaLoraConfig, {"init_r": 3, "target_r": 2, "total_step": 9}, EVERY[:-1]),
    "vblora": (
        peft.VBLoRAConfig,
        {"r": 2, "num_vectors": 5, "vector_length": 4, "topk": 2},
        LINEAR,
    ),
    "vblora, chosen": (
        peft.VBLoRAConfig,
        {"r": 2, "num_vectors": 5, "vector_length": 4, "topk": 3, "save_only_topk_weights": True},
        LINEAR,
    ),
    "unilora": (peft.UniLoraConfig, {"r": 2, "theta_d_length": 17}, LINEAR),
    "unilora, saved": (
        peft.UniLoraConfig,
        {"r": 2, "theta_d_length": 17, "save_indices": True},
        LINEAR,
    ),
    "ln tuning": (peft.LNTuningConfig, {}, ["norm"]),
}
INEXACT = {"fourierft"}  # PEFT forms the change in float32


def saved(case, folder, dtype, **more):
    """Return PEFT's model with random values in all that is trained, saved to a folder."""
    kind, options, targets = CASES[case]
    config = kind(target_modules=targets, **options, **more)
    torch.manual_seed(0)
    model = peft.get_peft_model(Net().to(dtype), config).to(dtype).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:  # which PEFT does not save
                noise = torch.randn(parameter.shape, generator=generator).to(dtype)
                parameter.add_(0.2 * noise)
    model.save_pretrained(folder)
    return model


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """PEFT warns about regenerated projections and CUDA."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_computes_the_same_and_trains(case, dtype, tmp_path):
    theirs = saved(case, tmp_path, dtype)
    ours = vl.load(Net().to(dtype), tmp_path).eval()
    expected = theirs(INDEX)
    coarse = 1e5 if case in INEXACT and dtype == torch.float64 else 10
    assert_close(ours(INDEX), expected, factor=coarse)
    assert not torch.allclose(expected, Net().to(dtype)(INDEX), atol=1e-3)
    ours(INDEX).square().sum().backward()
    assert all(item.grad is not None for _, item in vl.trainable_parameters(ours))


@pytest.mark.parametrize("case", CASES)
def test_it_is_written_back_in_the_same_form(case, tmp_path):
    dtype = torch.float64
    theirs = saved(case, tmp_path / "theirs", dtype)
    ours = vl.load(Net().to(dtype), tmp_path / "theirs").eval()
    report = vl.export(ours, tmp_path / "ours")
    kind = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["peft_type"]
    assert report.kind == kind
    there = peft.PeftModel.from_pretrained(Net().to(dtype), report).to(dtype).eval()
    # Files of PEFT's frozen values are in float32.
    assert_close(there(INDEX), theirs(INDEX), factor=1e5)
    again = vl.load(Net().to(dtype), report).eval()
    assert_close(again(INDEX), ours(INDEX), factor=1e5)


@pytest.mark.parametrize("case", CASES)
def test_a_native_copy_needs_no_peft(case, tmp_path):
    """Loading, saving and loading again is the same function."""
    saved(case, tmp_path / "theirs", torch.float32)
    ours = vl.load(Net(), tmp_path / "theirs").eval()
    vl.save(ours, tmp_path / "native.safetensors")
    assert_close(vl.load(Net(), tmp_path / "native.safetensors").eval()(INDEX), ours(INDEX))


@pytest.mark.parametrize("case", CASES)
def test_it_becomes_plain_lora_with_the_base_weights_or_is_refused(case, tmp_path):
    theirs = saved(case, tmp_path / "theirs", torch.float64)
    base = tmp_path / "base.safetensors"
    save_file(Net().double().state_dict(), base)
    try:
        report = vl.convert(tmp_path / "theirs", tmp_path / "plain", to="lora", base=base)
    except AdapterFileError as error:
        assert "load the adapter into its model" in str(error)  # noqa: PT017
        assert case in ("tinylora", "tinylora, tied", "unilora")
    except AdapterStateError:
        assert case == "ln tuning"
    else:
        assert_close(vl.load(Net().double(), report).eval()(INDEX), theirs(INDEX), factor=1e4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_takes_off_the_weight_is_taken_off_here(init, tmp_path):
    """PEFT has these inits in float32 only; the weight that they change stays as it was here."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=LINEAR, init_lora_weights=init)
    theirs = peft.get_peft_model(Net(), config).eval()
    with torch.no_grad():
        for name, item in theirs.named_parameters():
            if "lora" in name:
                item.add_(0.2 * torch.randn_like(item))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = vl.load(Net(), tmp_path / "theirs").eval()
    assert_close(ours(INDEX), theirs(INDEX))
    assert torch.equal(ours.fc.weight, Net().fc.weight)
    vl.export(ours, tmp_path / "ours")  # plain LoRA of twice the rank
    there = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours").eval()
    assert_close(there(INDEX), theirs(INDEX))
    with pytest.raises(AdapterFileError, match="depends on the base weights"):
        vl.convert(tmp_path / "theirs", tmp_path / "plain", to="lora")


def test_heads_and_biases_come_along(tmp_path):
    theirs = saved("lora", tmp_path, torch.float64, modules_to_save=["head"], bias="lora_only")
    ours = vl.load(Net().double(), tmp_path).eval()
    assert_close(ours(INDEX), theirs(INDEX))
    assert ours.head.weight.requires_grad
    assert torch.equal(ours.fc.bias, theirs.base_model.model.fc.base_layer.bias)
    vl.export(ours, tmp_path / "back")
    there = peft.PeftModel.from_pretrained(Net().double(), tmp_path / "back").eval()
    assert_close(there(INDEX), theirs(INDEX))
    vl.eject(ours)


@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r"fc\d?"},
        {"target_modules": ["fc2", "fc"], "exclude_modules": ["fc2"]},
    ],
)
def test_targets_are_those_that_peft_chose(more, tmp_path):
    config = peft.LoraConfig(r=2, **more)
    theirs = peft.get_peft_model(Net(), config)
    theirs.save_pretrained(tmp_path)
    chosen = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    assert set(hosts_of(vl.load(Net(), tmp_path))) == chosen


def test_ranks_that_adalora_took_away_are_gone(tmp_path):
    theirs = saved("adalora", tmp_path / "x", torch.float64)
    pattern = {"fc": [True, False, True], "fc2": [False] * 3}
    for layer, kept in pattern.items():
        lost = [index for index, keep in enumerate(kept) if not keep]
        with torch.no_grad():
            theirs.base_model.model.get_submodule(layer).lora_E["default"][lost] = 0
    theirs.peft_config["default"].rank_pattern = {
        f"{layer}.lora_E.default": kept for layer, kept in pattern.items()
    }
    theirs.save_pretrained(tmp_path)
    ours = vl.load(Net().double(), tmp_path).eval()
    assert_close(ours(INDEX), theirs(INDEX))
    assert "fc2" not in hosts_of(ours)
    report = vl.export(ours, tmp_path / "back")
    assert report.kind == "ADALORA"
    there = peft.PeftModel.from_pretrained(Net().double(), report).eval()
    assert_close(there(INDEX), theirs(INDEX))


NAMES = [
    *[f"visual.blocks.{index}.{leaf}" for index in (0, 1, 12) for leaf in ("fc", "attn.fc2")],
    "blocks.1.fc",
    "fc",
    "head.fc",
    "deep.layers.1.blocks.0.fc",
]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["fc"]},
        {"target_modules": ["fc"], "layers_to_transform": [1]},
        {"target_modules": ["fc", "blocks.1.fc"], "layers_to_transform": 0},
        {"target_modules": ["fc"], "layers_to_transform": [1, 12], "layers_pattern": "blocks"},
        {"target_modules": ["fc2"], "layers_to_transform": [0], "layers_pattern": ["a", "blocks"]},
        {"target_modules": r".*blocks\.1.*", "exclude_modules": ["fc2"]},
        {"target_modules": ["fc"], "exclude_modules": r"head\..*", "modules_to_save": ["visual"]},
    ],
)
def test_names_are_matched_as_peft_does(options):
    config = peft.LoraConfig(**options)
    theirs = [name for name in NAMES if check_target_module_exists(config, name)]
    if theirs:
        assert targeted({**config.to_dict(), **options}, NAMES) == theirs
    else:
        with pytest.raises(AdapterFileError, match="match no layer"):
            targeted({**config.to_dict(), **options}, NAMES)


WRONG = (None, -1, 10**4, 0.5, "(", [], {"(": 1})


@pytest.mark.parametrize("case", ["lora", "adalora", "lokr", "tinylora", "unilora"])
def test_no_configuration_crashes_load_or_leaves_a_half_changed_model(case, tmp_path):
    """Every value of the configuration is replaced by every kind of wrong value."""
    saved(case, tmp_path, torch.float32)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    model = Net()
    before = {key: item.clone() for key, item in model.state_dict().items()}
    for key in config:
        for value in WRONG:
            change(tmp_path, **{**config, key: value})
            try:
                vl.load(model, tmp_path)
            except VisionLoraError as error:
                assert "\n" not in str(error)  # noqa: PT017
                assert not hosts_of(model)
                assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
            else:  # a value that does no harm
                vl.eject(model)


@pytest.mark.parametrize("case", [case for case in CASES if "," not in case])
def test_no_tensor_crashes_load_or_leaves_a_half_changed_model(case, tmp_path):
    """Every tensor is dropped, cut, flattened and poisoned in turn."""
    saved(case, tmp_path, torch.float32)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    model = Net()
    damages = (
        lambda item: None,
        lambda item: item[:-1],
        lambda item: item[None],
        lambda item: item.reshape(-1, 1),
        lambda item: torch.full_like(item, -1),
        lambda item: item.float() * float("nan"),
    )
    for key, item in tensors.items():
        for damage in damages:
            changed = damage(item)
            kept = {k: v for k, v in tensors.items() if k != key}
            save_file(kept if changed is None else {**kept, key: changed.contiguous()}, path)
            try:
                vl.load(model, tmp_path)
            except VisionLoraError as error:
                assert "\n" not in str(error)  # noqa: PT017
                assert not hosts_of(model)
            else:
                vl.eject(model)


def test_a_pair_of_a_rank_beyond_the_layer_is_the_same_function(tmp_path):
    theirs = peft.get_peft_model(
        Net().double(),
        peft.LoraConfig(r=20, lora_alpha=9, use_rslora=True, target_modules=["fc", "head"]),
    ).eval()
    with torch.no_grad():
        for name, item in theirs.named_parameters():
            if "lora" in name:
                item.normal_()
    theirs.save_pretrained(tmp_path)
    ours = vl.load(Net().double(), tmp_path).eval()
    assert_close(ours(INDEX), theirs(INDEX))
    assert ours.head.adapters["default"]["weight"].A.shape == (3, 8)


def test_either_file_may_be_named(tmp_path):
    theirs = saved("lora", tmp_path, torch.float32)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert_close(vl.load(Net(), tmp_path / name).eval()(INDEX), theirs(INDEX))


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "IA3"}, "PEFT's IA3 cannot be read; supported: "),
        ({"peft_type": None}, "names no peft_type"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' is not supported"),
        ({"lora_alpha": "much"}, "inconsistent"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(values, said, tmp_path):
    saved("lora", tmp_path, torch.float32)
    change(tmp_path, **values)
    model = Net()
    with pytest.raises(AdapterFileError) as caught:
        vl.load(model, tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {type(module) for module in model.modules()} == {
        type(module) for module in Net().modules()
    }


def test_a_pickle_is_never_opened(tmp_path):
    saved("lora", tmp_path, torch.float32)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        with pytest.raises(AdapterFileError, match=r"is a pickle, which can run code"):
            vl.load(Net(), path)


@pytest.mark.parametrize("drop", ["lora_A", "lora_B"])
def test_a_missing_tensor_is_named(drop, tmp_path):
    saved("lora", tmp_path, torch.float32)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if f"fc.{drop}" not in k}, path)
    with pytest.raises(AdapterFileError, match=drop):
        vl.load(Net(), tmp_path)


def test_another_model_is_refused(tmp_path):
    saved("lora", tmp_path, torch.float32)
    other = Net()
    other.fc = nn.Linear(12, 20)
    with pytest.raises(AdapterFileError, match=r"fc\.weight is 20 x 12 here and 16 x 12"):
        vl.load(other, tmp_path)
    del other.fc
    with pytest.raises(AdapterFileError, match="no layer 'fc'"):
        vl.load(other, tmp_path)


def test_attention_is_read_as_peft_computes_it(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x, need_weights=False)[0]

    config = peft.LoraConfig(r=2, target_modules=["attn"])
    theirs = peft.get_peft_model(Attention(), config).eval()
    with torch.no_grad():
        for name, item in theirs.named_parameters():
            if "lora" in name:
                item.normal_()
    theirs.save_pretrained(tmp_path)
    x = torch.randn(2, 5, 8)
    ours = vl.load(Attention(), tmp_path).eval()
    assert_close(ours(x), theirs(x))
