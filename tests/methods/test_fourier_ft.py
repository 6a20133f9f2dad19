"""FourierFT: the sparse spectrum by definition, by real FFT and by factors."""

import math

import pytest
import torch

import visionlora as vl
from tests.methods.chains import adapted_chain, chain, change_of, delta_of, disturb
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.methods.fourier_ft import FourierFT, FourierFTConfig, _angles


def spectrum_of(delta):
    """Return the dense spectrum."""
    p, q = delta.positions
    spectrum = torch.zeros(delta.out_features, delta.in_features, dtype=delta.c.dtype)
    return spectrum.index_put((p, q), delta.c)


@pytest.mark.parametrize("shape", [(8, 6), (7, 6), (8, 5), (7, 5), (1, 6), (6, 1), (2, 2)])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_the_change_is_the_real_part_of_the_inverse_transform(shape, share):
    count = max(1, int(share * shape[0] * shape[1]))
    model = disturb(adapted_chain("fourier-ft", shape, coefficients=count, scale=9.0))
    delta = delta_of(model[0])
    expected = 9.0 * torch.fft.ifft2(spectrum_of(delta).to(torch.complex128)).real
    assert_close(change_of(model[0]), expected)
    # and its gradient, which is the real part of the transform at the positions
    goal = torch.randn(expected.shape).double()
    (delta.delta(model[0].weight) * goal).sum().backward()
    p, q = delta.positions
    assert_close(delta.c.grad, 9.0 * torch.fft.ifft2(goal.to(torch.complex128)).real[p, q])


def test_the_change_is_the_written_sum_of_cosines():
    delta = delta_of(disturb(adapted_chain("fourier-ft", (6, 5), coefficients=4))[0])
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for c, p, q in zip(delta.c.tolist(), *delta.positions.tolist(), strict=True):
        for k in range(5):
            for l in range(6):
                expected[k, l] += c * math.cos(2 * math.pi * (k * p / 5 + l * q / 6))
    assert_close(delta.delta(torch.zeros(5, 6, dtype=torch.float64)), 150 / 30 * expected)


@pytest.mark.parametrize("shape", [(40, 30), (31, 45)])
def test_a_few_coefficients_have_factors_and_many_do_not(shape):
    few = disturb(adapted_chain("fourier-ft", shape, coefficients=2))
    delta = delta_of(few[0])
    up, down = delta.factors()
    assert up.shape[1] == 4
    assert_close(delta.scale * up @ down, change_of(few[0]))
    torch.manual_seed(1)
    x = torch.randn(4, shape[0]).double()
    expected = torch.nn.functional.linear(x, few[0].weight + change_of(few[0]), few[0].bias)
    assert_close(few(x), expected)
    few(x).square().sum().backward()
    mine = delta.c.grad.clone()
    delta.c.grad = None
    weight = few[0].weight + delta.delta(few[0].weight)
    torch.nn.functional.linear(x, weight, few[0].bias).square().sum().backward()
    assert_close(mine, delta.c.grad, factor=10)
    assert delta_of(adapted_chain("fourier-ft", shape, coefficients=200)[0]).factors() is None


def test_angles_are_exact_for_large_sizes():
    size = 3072
    frequencies = torch.tensor([1, 1535, 3071])
    found = _angles(frequencies, size)
    assert found.dtype == torch.float64
    for column, f in enumerate(frequencies.tolist()):
        for k in (1, 1000, 3071):
            exact = 2 * math.pi * ((k * f) % size) / size
            assert abs(float(found[k, column]) - exact) < 1e-15 * 7


def test_float32_is_as_exact_as_its_inputs():
    model = disturb(adapted_chain("fourier-ft", (96, 64), coefficients=100))
    exact = change_of(model[0])
    delta = delta_of(model.float()[0])
    found = delta.delta(model[0].weight).detach()
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < 1e-6 * float(exact.abs().max())


def test_positions_differ_from_each_other_and_are_shared_by_shape():
    model = adapted_chain("fourier-ft", (8, 6), (6, 8), (8, 6), coefficients=20)
    first, second, third = (delta_of(layer).positions for layer in model[:3])
    assert len(set(zip(*first.tolist(), strict=True))) == 20
    assert torch.equal(first, third)
    assert not torch.equal(first, second)
    other = adapted_chain("fourier-ft", (8, 6), coefficients=20, seed=1)
    assert not torch.equal(first, delta_of(other[0]).positions)


def test_initial_values():
    model = adapted_chain("fourier-ft", (30, 40), coefficients=1000, init="normal")
    c = delta_of(model[0]).c.detach()
    assert abs(float(c.std()) - 1) < 0.1
    assert not change_of(adapted_chain("fourier-ft", (30, 40))[0]).any()


def test_counts_and_refusals():
    config = FourierFTConfig()
    assert 24 * FourierFT.parameter_count(config, 768, 768) == 24_000
    with pytest.raises(ConfigError, match=r"49 coefficients.*6 x 8.*at most 48"):
        adapted_chain("fourier-ft", (8, 6), coefficients=49)
    with pytest.raises(ConfigError, match="coefficients must be at least 1"):
        FourierFTConfig(coefficients=0)
    with pytest.raises(ConfigError, match="scale must not be 0"):
        FourierFTConfig(scale=0.0)


def test_a_file_with_other_positions_is_refused(tmp_path):
    model = disturb(adapted_chain("fourier-ft", (8, 6), coefficients=20))
    path = vl.save(model, tmp_path / "a.safetensors")
    x = torch.randn(3, 8).double()
    assert torch.equal(vl.load(chain((8, 6)), path)(x), model(x))
    other = adapted_chain("fourier-ft", (8, 6), coefficients=20, seed=1)
    with pytest.raises(vl.errors.AdapterFileError, match="frozen=True"):
        vl.load(other, path)
