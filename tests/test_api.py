"""The verbs in every order: what is allowed, what is refused, what is restored."""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import AdapterStateError, ConfigError, TargetError


class Model(nn.Module):
    """A small model with a head, a norm with statistics, and a class token in front."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(8))
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x + self.token)).relu()))


@pytest.fixture
def x():
    return torch.randn(6, 8)


def build(**options):
    torch.manual_seed(1)
    model = Model()
    return vl.inject(model, "lora", targets=["first", "second"], rank=2, **options)


@torch.no_grad()
def disturb(model):
    for _, item in vl.trainable_parameters(model):
        item.add_(torch.randn_like(item))
    return model


def test_inject_freezes_everything_but_the_adapter():
    names = [name for name, item in build().named_parameters() if item.requires_grad]
    assert names == [
        f"{layer}.adapters.default.weight.{factor}"
        for layer in ("first", "second")
        for factor in "AB"
    ]


def test_freeze_false_leaves_the_flags():
    model = build(freeze=False)
    assert all(item.requires_grad for item in model.parameters())


def test_freeze_base_keeps_the_named_parts_trainable():
    model = vl.freeze_base(build(), train=("head", "nor*"))
    kept = {name for name, _ in vl.trainable_parameters(model) if "adapters" not in name}
    assert kept == {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    with pytest.raises(TargetError, match="head"):
        vl.freeze_base(model, train="heda")
    assert {name for name, _ in vl.trainable_parameters(model) if "adapters" not in name} == kept


def test_a_head_named_before_inject_stays_trainable():
    torch.manual_seed(1)
    model = vl.freeze_base(Model(), train="head")
    vl.inject(model, "lora", targets="first", rank=2)
    assert model.head.weight.requires_grad
    assert not model.second.weight.requires_grad
    vl.eject(model)
    assert all(item.requires_grad for item in model.parameters())


def test_a_name_is_taken_once():
    model = build()
    before = dict(model.named_parameters())
    with pytest.raises(AdapterStateError, match="default"):
        vl.inject(model, "lora", targets="head", rank=2)
    assert dict(model.named_parameters()) == before
    vl.inject(model, "lora", targets="head", rank=2, name="other")


@pytest.mark.parametrize(
    "name", ["", "a.b", "a b", "-", "keys", "forward", "training", "type", None, 3]
)
def test_an_adapter_name_that_cannot_be_one_is_refused_before_anything_changes(name):
    torch.manual_seed(1)
    model = Model()
    with pytest.raises(ConfigError, match="name"):
        vl.inject(model, "lora", targets="first", rank=2, name=name)
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize(
    "verb",
    [
        vl.merge,
        vl.unmerge,
        vl.eject,
        lambda model: vl.use(model, "default"),
        lambda model: vl.set_scale(model, 0.5),
        lambda model: vl.adapter_state_dict(model),
        lambda model: vl.save(model, "never.safetensors"),
        lambda model: vl.merged(model).__enter__(),
        lambda model: vl.disabled(model).__enter__(),
    ],
)
def test_verbs_need_an_adapter(verb):
    with pytest.raises(AdapterStateError):
        verb(Model())


@pytest.mark.parametrize(
    "verb",
    [
        vl.merge,
        lambda model: vl.use(model, None),
        lambda model: vl.set_scale(model, 0.5),
        lambda model: vl.disabled(model).__enter__(),
        lambda model: vl.inject(model, "lora", targets="head", rank=2, name="late"),
        lambda model: vl.load_adapter_state_dict(model, vl.adapter_state_dict(model)),
    ],
)
def test_a_merged_model_refuses_what_would_make_it_wrong(verb, x):
    model = disturb(build()).eval()
    vl.merge(model)
    expected = model(x)
    with pytest.raises(AdapterStateError, match="merged"):
        verb(model)
    assert torch.equal(model(x), expected)


def test_loading_into_a_merged_model_is_refused(tmp_path, x):
    path = vl.save(disturb(build()), tmp_path / "a.safetensors")
    model = vl.merge(disturb(build()).eval())
    expected = model(x)
    for name in ("default", "other"):
        with pytest.raises(AdapterStateError, match="merged"):
            vl.load(model, path, name=name)
    assert torch.equal(model(x), expected)


def test_saving_while_merged_saves_the_same_file(tmp_path):
    model = disturb(build())
    plain = vl.save(model, tmp_path / "plain.safetensors").read_bytes()
    with vl.merged(model):
        assert vl.save(model, tmp_path / "merged.safetensors").read_bytes() == plain


@pytest.mark.parametrize("verb", [vl.use, lambda model, name: vl.set_scale(model, 2.0, name)])
def test_an_unknown_adapter_is_named_with_the_nearest(verb):
    with pytest.raises(AdapterStateError, match="default"):
        verb(build(), "defualt")


def test_nothing_is_injected_while_adapters_are_disabled():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    vl.inject(model, "lora", "0", rank=2)
    with vl.disabled(model), pytest.raises(AdapterStateError, match="leave the"):
        vl.inject(model, "lora", "1", rank=2, name="second")
    assert type(model[1]) is nn.Linear


def test_merged_and_disabled_end_with_their_block_even_after_an_error(x):
    model = disturb(build()).eval()
    expected = model(x)
    with vl.merged(model):
        assert_close(model(x), expected)
    with pytest.raises(ZeroDivisionError), vl.merged(model):
        raise ZeroDivisionError
    assert torch.equal(model(x), expected)
    with pytest.raises(ZeroDivisionError), vl.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(model(x), expected)


def test_use_selects_and_a_repeated_name_counts_once(x):
    model = build(name="a").eval()
    vl.inject(model, "lora", targets=["first", "head"], rank=1, name="b")
    disturb(model)
    both = model(x)
    one = vl.use(model, "a")(x)
    assert torch.equal(vl.use(model, ["a", "a"])(x), one)
    assert not torch.equal(one, both)
    assert torch.equal(vl.use(model, ["a", "b"])(x), both)
    names = [name for name, _ in vl.trainable_parameters(vl.use(model, "b"))]
    assert all(".b." in name for name in names)
    assert {name.split(".")[0] for name in names} == {"first", "head"}
    vl.use(model, "a")
    assert vl.summary(model).active == ("a",)


def test_merge_adds_only_what_is_active(x):
    model = build(name="a").eval()
    vl.inject(model, "lora", targets="head", rank=1, name="b")
    disturb(model)
    vl.use(model, "a")
    expected = model(x)
    vl.eject(model, merge=True)
    assert_close(model(x), expected)


def test_batch_statistics_and_tokens_return_with_eject(x):
    torch.manual_seed(1)
    model = Model()
    model.head.requires_grad_(False)
    expected = model.eval()(x)
    flags = [item.requires_grad for item in model.parameters()]
    vl.inject(model, "lora", targets="first", rank=2)
    disturb(model).train()
    for _ in range(3):
        model(x + 5)
    vl.eject(model)
    assert torch.equal(model.eval()(x), expected)
    assert [item.requires_grad for item in model.parameters()] == flags


def test_one_module_under_two_names_merges_once(x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.two = self.one

        def forward(self, x):
            return self.two(self.one(x))

    model = vl.inject(Twice(), "lora", targets="one", rank=2)
    disturb(model)
    expected = model(x)
    with vl.merged(model):
        assert_close(model(x), expected)
    vl.eject(model)


def test_a_weight_tied_to_another_layer_is_not_merged():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 8)
            self.read = nn.Linear(8, 9, bias=False)
            self.read.weight = self.table.weight

    model = vl.inject(Tied(), "lora", targets="table", rank=2)
    before = model.read.weight.clone()
    with pytest.raises(AdapterStateError, match=r"read\.weight"):
        vl.merge(model)
    with pytest.raises(AdapterStateError, match=r"read\.weight"):
        vl.eject(model, merge=True)
    assert torch.equal(model.read.weight, before)
    vl.eject(model)
    assert model.read.weight is model.table.weight


def test_a_second_adapter_cannot_force_another_mode():
    model = build(mode="dense")
    with pytest.raises(AdapterStateError, match="dense"):
        vl.inject(model, "lora", targets="first", rank=2, name="b", mode="factored")
    vl.inject(model, "lora", targets="first", rank=2, name="b", mode="dense")
    vl.inject(model, "lora", targets="first", rank=2, name="c")


def test_merging_into_half_precision_tells_what_is_lost(caplog):
    model = nn.Sequential(nn.Linear(32, 32)).to(torch.bfloat16)
    vl.inject(model, "lora", targets="0", rank=2)
    with torch.no_grad():
        model[0].adapters["default"]["weight"].B.fill_(1e-4)
    before = model[0].weight.clone()
    vl.merge(model)
    assert "bfloat16" in caplog.text
    vl.unmerge(model)
    assert torch.equal(model[0].weight, before)


def test_options_go_with_a_name_not_with_a_configuration():
    config = vl.build_config("lora", {"rank": 2})
    with pytest.raises(ConfigError, match="rank"):
        vl.inject(Model(), config, targets="first", rank=4)
    model = vl.inject(Model(), config, targets="first")
    assert model.first.adapters["default"]["weight"].A.shape == (2, 8)


def test_a_sequential_root_still_runs_with_shared_tensors(x):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    expected = model(x)
    vl.inject(model, "vera", targets=["0", "2"], rank=4)
    assert torch.equal(model(x), expected)
    vl.eject(model)
    assert len(model) == 3


@pytest.mark.parametrize("block", [vl.merged, vl.disabled])
def test_a_model_ejected_inside_a_block_is_the_base_model_after_it(block, x):
    model = build().eval()
    disturb(model)
    with vl.disabled(model):
        expected = model(x)
    with block(model):
        vl.eject(model)
    assert type(model.first) is nn.Linear
    assert torch.equal(model(x), expected)


def test_an_error_inside_a_block_that_unmerged_is_the_one_raised():
    def block(model):
        with vl.merged(model):
            vl.unmerge(model)
            raise KeyError

    with pytest.raises(KeyError):
        block(build())


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        (lambda model: vl.inject(model, None), "method"),
        (lambda model: vl.inject(model, vl.get_method("lora")), "method"),
        (lambda model: vl.inject(model, "lora", targets="first", rank=2, mode="fast"), "mode"),
        (lambda model: vl.set_scale(build(), float("nan")), "finite"),
        (lambda model: vl.set_scale(build(), "big"), "finite"),
    ],
)
def test_arguments_of_another_kind_are_refused_in_one_line(verb, said):
    model = Model()
    with pytest.raises(ConfigError, match=said) as caught:
        verb(model)
    assert "\n" not in str(caught.value)
    assert type(model.first) is nn.Linear


def test_what_is_no_module_is_refused():
    with pytest.raises(ConfigError, match=r"model must be a torch\.nn\.Module, got int"):
        vl.inject(3, "lora")
