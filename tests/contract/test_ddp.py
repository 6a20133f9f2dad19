"""Data-parallel wrapping: every trainable tensor takes part, and no gradient changes."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import visionlora as vl
from tests.contract.cases import DEFAULTS, adapted, gradients, pairs
from tests.contract.kinds import KINDS

TWO = [kind for kind in KINDS if kind.name in ("qkv-slices", "conv-strided", "layer-norm")]


@pytest.fixture(scope="module")
def _group(tmp_path_factory):
    store = tmp_path_factory.mktemp("ddp") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
@pairs(DEFAULTS, TWO)
def test_a_data_parallel_wrapper_changes_no_gradient(config, kind):
    model, inputs = adapted(config, kind), kind.inputs()
    tensors = [item for _, item in vl.trainable_parameters(model)]
    output = model(*inputs)
    expected = gradients(output, tensors)
    weight = torch.randn(
        output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    wrapped = DistributedDataParallel(model)
    for _ in range(2):  # the second pass finds out whether a tensor was missing in the first
        model.zero_grad(set_to_none=True)
        (wrapped(*inputs) * weight).sum().backward()
    for item, gradient in zip(tensors, expected, strict=True):
        assert torch.allclose(item.grad, gradient, rtol=1e-12, atol=1e-12)
