"""The compiler sees one graph without breaks."""

import pytest
import torch
from cases import DEFAULTS, KINDS, adapted, gradients, pairs
from tolerances import assert_close

import visionlora as vl

SITES = [kind for kind in KINDS if kind.name in ("qkv-slices", "conv-groups")]


@pytest.mark.slow
@pairs(DEFAULTS, SITES)
def test_a_compiled_layer_gives_the_same_output_and_gradients(config, kind):
    model, inputs = adapted(config, kind), kind.inputs()
    tensors = [item for _, item in vl.trainable_parameters(model)]
    expected = model(*inputs)
    torch._dynamo.reset()
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    assert_close(actual, expected)
    for one, other in zip(gradients(actual, tensors), gradients(expected, tensors), strict=True):
        assert_close(one, other)
