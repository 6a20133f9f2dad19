"""The attention host is nn.MultiheadAttention with other weights, in every form of call."""

import copy

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.hosts.linear import adapted_linear

E, HEADS, B, L, S = 8, 2, 3, 4, 5
INF = float("-inf")


def pair(targets="0", dropout_seed=None, **options):
    """Return an adapted attention and the plain one with the changes merged into its weights."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.MultiheadAttention(E, HEADS, dtype=torch.float64, **options))
    for name, item in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(item)
    vl.inject(model, "lora", targets=targets, rank=2)
    with torch.no_grad():
        for _, item in vl.trainable_parameters(model):
            item.add_(0.3 * torch.randn_like(item))
    merged = vl.eject(copy.deepcopy(model), merge=True)
    assert type(merged[0]) is nn.MultiheadAttention
    return model[0], merged[0]


def inputs(batch_first, cross, batched=True, kdim=E, vdim=E):
    q = torch.randn(B, L, E, dtype=torch.float64)
    k = torch.randn(B, S, kdim, dtype=torch.float64) if cross else q
    v = torch.randn(B, S, vdim, dtype=torch.float64) if cross else q
    if not batched:
        q, k, v = q[0], k[0], v[0]
    elif not batch_first:
        q, k, v = (item.transpose(0, 1) for item in (q, k, v))
    return (q, k, v) if cross else (q, q, q)


def masks(form, keys, batched=True):
    """Return keyword arguments of one form of mask; no query is blocked from every key."""
    generator = torch.Generator().manual_seed(5)

    def blocked(*shape):
        mask = torch.rand(shape, generator=generator) < 0.4
        mask[..., 0] = False
        return mask

    def additive(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    padding = blocked(B, keys) if batched else blocked(keys)
    heads = B * HEADS if batched else HEADS
    floats = torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, INF)
    return {
        "none": {},
        "bool": {"attn_mask": blocked(L, keys)},
        "float": {"attn_mask": additive(L, keys)},
        "per-head-bool": {"attn_mask": blocked(heads, L, keys)},
        "per-head-float": {"attn_mask": additive(heads, L, keys)},
        "padding-bool": {"key_padding_mask": padding},
        "padding-float": {"key_padding_mask": floats},
        "both-bool": {"attn_mask": blocked(L, keys), "key_padding_mask": padding},
        "both-float": {"attn_mask": additive(L, keys), "key_padding_mask": floats},
        "both-per-head": {"attn_mask": blocked(heads, L, keys), "key_padding_mask": padding},
        "causal": {
            "attn_mask": torch.ones(L, keys).triu(1).bool(),
            "is_causal": True,
        },
    }[form]


FORMS = [
    "none",
    "bool",
    "float",
    "per-head-bool",
    "per-head-float",
    "padding-bool",
    "padding-float",
    "both-bool",
    "both-float",
    "both-per-head",
    "causal",
]


def compare(host, plain, arguments, options):
    # Torch drops the mask for the hint if it needs no weights, and so the extra key.
    extended = plain.bias_k is not None or plain.add_zero_attn
    told = {**options, "is_causal": False} if extended else options
    for training in (True, False):
        for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            actual = host.train(training)(*arguments, **options, **weights)
            expected = plain.train(training)(*arguments, **told, **weights)
            assert_close(actual[0], expected[0])
            assert (actual[1] is None) == (expected[1] is None)
            if expected[1] is not None:
                assert_close(actual[1], expected[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_masks(form, cross, batch_first):
    host, plain = pair(batch_first=batch_first)
    compare(host, plain, inputs(batch_first, cross), masks(form, S if cross else L))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cross", [False, True])
def test_unbatched(form, cross):
    host, plain = pair()
    arguments = inputs(False, cross, batched=False)
    compare(host, plain, arguments, masks(form, S if cross else L, batched=False))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"bias": False},
        {"kdim": 6, "vdim": 10},
        {"kdim": 6, "vdim": 10, "add_bias_kv": True, "bias": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(form, options):
    host, plain = pair(batch_first=True, **options)
    arguments = inputs(True, True, kdim=options.get("kdim", E), vdim=options.get("vdim", E))
    compare(host, plain, arguments, masks(form, S))


@pytest.mark.parametrize("target", ["0[q]", "0[k]", "0[v]", "0[out]", "0.out_proj", "type:Linear"])
def test_each_projection_alone(target):
    host, plain = pair(targets=target, batch_first=True)
    compare(host, plain, inputs(True, True), {})
    compare(host, plain, inputs(True, False), {})


def test_attention_dropout_draws_the_same_mask():
    for need_weights in (True, False):
        host, plain = pair(batch_first=True, dropout=0.5)
        arguments = inputs(True, False)
        torch.manual_seed(3)
        actual = host(*arguments, need_weights=need_weights)[0]
        torch.manual_seed(3)
        expected = plain(*arguments, need_weights=need_weights)[0]
        assert_close(actual, expected)
        assert not torch.allclose(actual, host(*arguments, need_weights=need_weights)[0])
        assert_close(host.eval()(*arguments)[0], plain.eval()(*arguments)[0])


def test_a_causal_hint_without_a_mask_is_refused_as_in_torch():
    host, plain = pair(batch_first=True)
    for layer in (host, plain):
        with pytest.raises(RuntimeError, match="is_causal"):
            layer(*inputs(True, False), is_causal=True, need_weights=False)


def test_shared_key_and_value_and_other_identities():
    host, plain = pair(batch_first=True)
    q, k, _ = inputs(True, True)
    compare(host, plain, (q, k, k), {})
    twin = q.clone()
    compare(host, plain, (q, q, twin), {})
    compare(host, plain, (q, twin, q), {})


def test_a_padded_batch_equals_its_parts():
    host, _ = pair(batch_first=True)
    x = torch.randn(2, L, E, dtype=torch.float64)
    padding = torch.zeros(2, L, dtype=torch.bool)
    padding[1, 2:] = True
    together = host(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    alone = host(x[1:, :2], x[1:, :2], x[1:, :2], need_weights=False)[0]
    assert_close(together[1:, :2], alone)


def test_a_projection_without_an_adapter_stays_a_plain_product():
    weight = torch.randn(4, 4)
    x = torch.randn(50, 4, requires_grad=True)
    y = adapted_linear(x, weight, None, (), training=True)
    assert torch.equal(y, torch.nn.functional.linear(x, weight))
    plain = torch.nn.functional.linear(x, weight)
    assert type(y.grad_fn) is type(plain.grad_fn)
