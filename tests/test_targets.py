"""Which weights a pattern names, and what is refused."""

import pytest
import torch
from torch import nn

import visionlora as vl
from visionlora.errors import TargetError
from visionlora.targets import find_targets, row_range


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.attn = Attention()
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(11))
        self.cross = nn.MultiheadAttention(8, 2)
        self.kv = nn.Linear(8, 16)
        self.head = nn.Linear(8, 5)
        self.table = nn.Embedding(7, 8)


def names(targets, exclude=()):
    return [(match.name, match.keys) for match in find_targets(Vision(), targets, exclude=exclude)]


def test_a_suffix_matches_every_block_in_module_order():
    assert names("attn.qkv[q,v]") == [(f"blocks.{i}.attn.qkv", ("q", "v")) for i in range(11)]


def test_globs_match_full_names_and_suffixes():
    assert [name for name, _ in names("blocks.1?.mlp.fc*")] == [
        "blocks.10.mlp.fc1",
        "blocks.10.mlp.fc2",
    ]


def test_a_list_is_a_union_and_exclude_subtracts():
    both = names(["attn.qkv[q]", "attn.qkv[v]", "head"], exclude="blocks.1*")
    assert ("blocks.0.attn.qkv", ("q", "v")) in both
    assert ("head", ("weight",)) in both
    assert not any(name.startswith("blocks.1") for name, _ in both)


def test_a_suffix_of_linear_and_convolution_means_the_linear_layers():
    assert all(name.startswith("blocks") for name, _ in names("proj"))
    assert names("patch_embed.proj") == [("patch_embed.proj", ("weight",))]
    assert names("type:Conv2d") == [("patch_embed.proj", ("weight",))]


def test_attention_modules_have_four_slices():
    assert names("cross") == [("cross", ("q", "k", "v", "out"))]
    assert names("cross[k,out]") == [("cross", ("k", "out"))]
    assert names("cross.out_proj") == [("cross", ("out",))]
    assert names(["cross[q]", "cross.out_proj"]) == [("cross", ("q", "out"))]


def test_type_linear_does_not_adapt_an_attention_twice():
    found = dict(names("type:Linear"))
    assert found["cross"] == ("out",)
    assert "cross.out_proj" not in found


def test_rows_of_fused_layers():
    assert row_range("blocks.0.attn.qkv", 24, "v") == (16, 24)
    assert row_range("kv", 16, "v") == (8, 16)
    assert row_range("proj", 24, "rows_3_7") == (3, 7)
    assert names("kv[k]") == [("kv", ("k",))]


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("attn.qvk", "attn.qkv"),  # the near miss
        ("blocks.*.atn.qkv", "attn.qkv"),
        ("encoder.layers.*", "no module matches"),
        ("norm1", "LayerNorm"),
        ("type:Linaer", "Linear"),
        ("attn.qkv[q,x]", "'x'"),
        ("attn.qkv[0:25]", "24 rows"),
        ("attn.qkv[5:5]", "5:5"),
        ("head[q]", "5 rows"),
        ("kv[q]", "k, v"),
        ("cross[w]", "q, k, v, out"),
        ("cross[0:8]", "q, k, v, out"),
        ("cross.out_proj[q]", "no slices"),
        ("table[q]", "Embedding"),
        ("attn.qkv[", "cannot read"),
        ("attn.qkv[]", "cannot read"),
        ("", "non-empty"),
        ("  ", "non-empty"),
        (["attn.qkv", "atn.proj"], "atn.proj"),  # one bad pattern in a list
        ([], "no target"),
        ([3], "pattern"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line_and_nothing_changes(targets, said):
    model = Vision()
    kinds = [type(module) for module in model.modules()]
    flags = [item.requires_grad for item in model.parameters()]
    with pytest.raises(TargetError) as caught:
        vl.inject(model, "lora", targets=targets, rank=2)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds
    assert [item.requires_grad for item in model.parameters()] == flags


def test_exclude_subtracts_slices():
    assert names("attn.qkv[q,k]", exclude="attn.qkv[k]") == names("attn.qkv[q]")
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    (match,) = find_targets(attention, "0[q,out]", exclude="*out_proj")
    assert match.keys == ("q",)
    with pytest.raises(TargetError, match="removes none"):
        names("attn.qkv[q]", exclude="attn.qkv[v]")


def test_an_exclusion_must_exclude_something_but_not_everything():
    with pytest.raises(TargetError, match="'nothing'"):
        names("attn.qkv", exclude="nothing")
    with pytest.raises(TargetError, match="no target left"):
        names("attn.qkv", exclude="blocks.*")


@pytest.mark.parametrize("targets", [[], None, 3])
def test_no_pattern_at_all_is_refused(targets):
    with pytest.raises(TargetError, match="target"):
        find_targets(Vision(), targets)


def test_a_projection_that_is_not_fused_has_no_named_slices_but_row_ranges():
    model = Vision()
    model.blocks[0].attn.proj = nn.Linear(9, 9)
    with pytest.raises(TargetError, match="no fused projection with a slice 'q'"):
        find_targets(model, "blocks.0.attn.proj[q]")
    assert find_targets(model, "blocks.0.attn.proj[0:3]")[0].keys == ("rows_0_3",)
    model.kv = nn.Linear(16, 16)  # keys and values of a wider context
    assert find_targets(model, "kv[v]")[0].keys == ("v",)


def grouped():
    return nn.Conv2d(4, 8, 3, groups=2)


def parametrised():
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))


def hooked():
    return nn.utils.spectral_norm(nn.Linear(4, 6))


def lazy():
    return nn.LazyLinear(6)


def renormalised():
    return nn.Embedding(7, 4, max_norm=1.0)


def whole_numbers():
    layer = nn.Linear(4, 6)
    layer.weight = nn.Parameter(torch.ones(6, 4, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("build", "target"),
    [
        (grouped, "layer[0:4]"),
        (parametrised, "layer"),
        (hooked, "layer"),
        (lazy, "layer"),
        (renormalised, "layer"),
        (whole_numbers, "layer"),
        (lambda: nn.Linear(0, 4), "layer"),
        (lambda: nn.Linear(4, 0), "layer"),
        (lambda: nn.LayerNorm(0), "layer"),
        (lambda: nn.Conv1d(4, 6, 3), "layer"),
        (lambda: nn.Bilinear(4, 4, 6), "layer"),
    ],
)
def test_layers_of_another_form_are_refused(build, target):
    model = nn.Sequential()
    model.layer = build()
    kind = type(model.layer)
    with pytest.raises(TargetError, match="layer"):
        vl.inject(model, "lora", targets=target, rank=2)
    assert type(model.layer) is kind


def test_an_attention_subclass_with_its_own_forward_is_refused():
    class Own(nn.MultiheadAttention):
        def forward(self, *inputs, **options):
            return super().forward(*inputs, **options)

    model = nn.Sequential()
    model.layer = Own(8, 2)
    with pytest.raises(TargetError, match="Own"):
        vl.inject(model, "lora", targets="layer", rank=2)


def test_a_lone_layer_is_its_own_target():
    layer = nn.Linear(8, 8)
    vl.inject(layer, "lora", targets="type:Linear", rank=2)
    assert [name for name, _ in vl.trainable_parameters(layer)] == [
        "adapters.default.weight.A",
        "adapters.default.weight.B",
    ]


def test_adapters_that_are_there_are_no_targets():
    """Their modules have names too: of sites, such as `out`, and the name that the user gave."""
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    vl.inject(model, "lora", ["attn[q,out]", "out"], name="mine", rank=2)
    vl.inject(model, "tied-lora", "out", name="out", rank=2)
    assert [match.name for match in find_targets(model, "out")] == ["out"]
    for name in ("mine", "adapters", "visionlora_shared"):
        with pytest.raises(TargetError, match=f"no module matches target '{name}'"):
            find_targets(model, name)
