"""The compiler sees one graph without breaks.

Compiled in a process of its own: the suite's shape checks wrap the methods, which breaks graphs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import visionlora as vl
from tests.contract.cases import DEFAULTS, adapted, gradients, refused
from tests.contract.kinds import KINDS
from tests.tolerances import assert_close

CASES = [
    (config, kind)
    for config in DEFAULTS
    for kind in KINDS
    if kind.name in ("qkv-slices", "conv-groups", "mha-self") and not refused(config, kind)
]


def compile_all():
    for config, kind in CASES:
        model, inputs = adapted(config, kind), kind.inputs()
        tensors = [item for _, item in vl.trainable_parameters(model)]
        expected = model(*inputs)
        torch._dynamo.reset()
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
        assert_close(actual, expected)
        pairs = zip(gradients(actual, tensors), gradients(expected, tensors), strict=True)
        for one, other in pairs:
            assert_close(one, other)
        print("compiled", config.method, kind.name)


@pytest.mark.slow
def test_compiled_layers_give_the_same_output_and_gradients():
    here = Path(__file__).resolve()
    paths = [str(here.parent), str(here.parents[1]), str(here.parents[2])]
    done = subprocess.run(
        [sys.executable, str(here)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == len(CASES)


if __name__ == "__main__":
    compile_all()
