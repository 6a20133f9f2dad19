"""Equivalent gradients: optimal, whatever X, whatever the basis, down to zero factors."""

import pytest
import torch

from tests.tolerances import assert_close
from visionlora.dynamics.equivalent import Pair, gram, sylvester

M, N, R = 12, 10, 3
CHOICES = ["sylvester", "zero", "symmetric"]


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Case:
    """A random pair, the gradient of the weight, and what the pair sees of it."""

    def __init__(self, scale=1.7, seed=0, rank=R):
        self.B, self.A, self.g = (
            normal(M, rank, seed=seed),
            normal(rank, N, seed=seed + 1),
            normal(M, N, seed=seed + 2),
        )
        self.s = scale

    @property
    def gradients(self):
        return self.s * self.g @ self.A.T, self.s * self.B.T @ self.g

    @property
    def pair(self):
        return Pair.of(self.B, self.A, self.s, ridge=0.0)

    @property
    def projections(self):
        def onto(basis):
            return basis @ torch.linalg.pinv(basis)

        return onto(self.B), onto(self.A.T)

    def step(self, choice):
        return self.pair.optimal(*self.gradients, choice)

    def equivalent(self, choice):
        left, right = self.pair.equivalent(*self.step(choice))
        return left @ right


@pytest.fixture(params=[0.25, 1.0, 16.0])
def case(request):
    return Case(scale=request.param)


@pytest.mark.parametrize("choice", CHOICES)
def test_equivalent_gradient_is_the_projection_for_every_choice(case, choice):
    P_B, P_A = case.projections
    rest = torch.eye(M, dtype=torch.float64) - P_B
    left_out = rest @ case.g @ (torch.eye(N, dtype=torch.float64) - P_A)
    assert_close(case.equivalent(choice), P_B @ case.g + rest @ case.g @ P_A)
    assert_close(case.g - case.equivalent(choice), left_out)


@pytest.mark.parametrize("choice", CHOICES)
def test_equivalent_gradient_is_the_change_per_step(case, choice):
    new_up, new_down = case.step(choice)
    assert_close(case.equivalent(choice), case.s * (case.B @ new_down + new_up @ case.A))
    rate = 1e-3
    moved = case.s * (case.B - rate * new_up) @ (case.A - rate * new_down)
    second_order = rate**2 * case.s * new_up @ new_down
    step = -rate * case.equivalent(choice) + second_order
    assert_close(moved - case.s * case.B @ case.A, step)


def test_no_step_of_the_pair_is_closer_to_the_gradient(case):
    """The step solves the least-squares problem over both factors at once."""
    eye_n, eye_m = (torch.eye(k, dtype=torch.float64) for k in (N, M))
    # Row-major vec: vec(B G) = (B kron I) vec G, vec(G A) = (I kron A^T) vec G.
    system = case.s * torch.cat(
        [torch.kron(case.B, eye_n), torch.kron(eye_m, case.A.T.contiguous())], dim=1
    )
    best = torch.linalg.lstsq(system, case.g.reshape(-1, 1), driver="gelsd").solution
    assert_close(case.equivalent("sylvester"), (system @ best).reshape(M, N))


@pytest.mark.parametrize("choice", CHOICES)
def test_loss_falls_by_the_square_of_the_equivalent_gradient(case, choice):
    falls = sum(
        (old * new).sum() for old, new in zip(case.gradients, case.step(choice), strict=True)
    )
    assert_close(falls, case.equivalent(choice).square().sum())


def test_any_other_mix_changes_the_factors_but_not_the_weight(case):
    new_up, new_down = case.step("sylvester")
    X = normal(R, R, seed=9)
    left, right = case.pair.equivalent(new_up - case.B @ X, new_down + X @ case.A)
    assert_close(left @ right, case.equivalent("sylvester"))


def test_sylvester_choice_is_closest_to_the_gradients_of_the_factors(case):
    new_up, new_down = case.step("sylvester")
    grad_up, grad_down = case.gradients

    def distance(X):
        moved = new_up - case.B @ X - grad_up, new_down + X @ case.A - grad_down
        return sum(item.square().sum() for item in moved)

    X = torch.zeros(R, R, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(distance(X), X)
    assert float(slope.abs().max()) < 1e-9 * float(grad_up.norm() * case.B.norm())
    for seed in range(5):
        assert distance(0.1 * normal(R, R, seed=seed)) > distance(torch.zeros_like(X))


def test_sylvester_residual_vanishes():
    left, right = gram(normal(R, M, seed=1), 0.0), gram(normal(R, N, seed=2), 0.0)
    matrix = normal(R, R, seed=3)
    X = sylvester(left, right, matrix)
    residual = left.matrix @ X + X @ right.matrix - matrix
    assert float(residual.abs().max()) < 1e-10


def test_symmetric_choice_halves_the_shared_part(case):
    P_B, P_A = case.projections
    grad_up, grad_down = case.gradients
    new_up, new_down = case.step("symmetric")
    inverse_up, inverse_down = (torch.linalg.inv(f) for f in (case.B.T @ case.B, case.A @ case.A.T))
    eye_m, eye_n = (torch.eye(k, dtype=torch.float64) for k in (M, N))
    assert_close(new_down, case.s**-2 * inverse_up @ grad_down @ (eye_n - P_A / 2))
    assert_close(new_up, case.s**-2 * (eye_m - P_B / 2) @ grad_up @ inverse_down)


@pytest.mark.parametrize("choice", CHOICES)
def test_equivalent_gradient_does_not_depend_on_the_basis_of_the_pair(case, choice):
    Q = normal(R, R, seed=5) + 3 * torch.eye(R, dtype=torch.float64)
    other = Case(case.s)
    other.B, other.A = case.B @ Q, torch.linalg.inv(Q) @ case.A
    assert_close(other.equivalent(choice), case.equivalent(choice))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_from_zero_up_only_up_moves(case, choice, ridge):
    case.B = torch.zeros_like(case.B)
    pair = Pair.of(case.B, case.A, case.s, ridge)
    new_up, new_down = pair.optimal(*case.gradients, choice)
    assert not new_down.any()
    left, right = pair.equivalent(new_up, new_down)
    assert_close(left @ right, case.g @ case.projections[1], 1e5 if ridge else 1.0)


def test_from_zero_down_only_down_moves(case):
    """An embedding starts the other way round."""
    case.A = torch.zeros_like(case.A)
    new_up, new_down = case.step("sylvester")
    assert not new_up.any()
    left, right = case.pair.equivalent(new_up, new_down)
    assert_close(left @ right, case.projections[0] @ case.g)


def test_two_zero_factors_do_not_move(case):
    case.A, case.B = torch.zeros_like(case.A), torch.zeros_like(case.B)
    assert not any(step.any() for step in case.step("sylvester"))


def test_a_held_down_matrix_does_not_move(case):
    new_up, new_down = case.pair.with_down_held().optimal(*case.gradients)
    assert not new_down.any()
    assert_close(case.s * new_up @ case.A, case.g @ case.projections[1])


def test_full_rank_pair_sees_the_whole_gradient():
    case = Case(rank=N)
    assert_close(case.equivalent("sylvester"), case.g)


def test_regularisation_follows_the_size_of_the_factor():
    """Scaling a factor scales what is added, so the projection stays as regularised as it was."""
    factor = normal(R, N, seed=4)
    large, small = (gram(k * factor, 1e-2) for k in (1e3, 1e-3))
    assert_close(large.inverse @ large.matrix, small.inverse @ small.matrix)
    assert float((large.inverse @ large.matrix).diagonal().max()) < 1.0


def test_a_lost_direction_leaves_everything_finite(case):
    case.B[:, 1] = case.B[:, 0]
    pair = Pair.of(case.B, case.A, case.s)
    left, right = pair.equivalent(*pair.optimal(*case.gradients))
    P_B, P_A = case.projections
    rest = torch.eye(M, dtype=torch.float64) - P_B
    assert_close(left @ right, P_B @ case.g + rest @ case.g @ P_A, 1e6)


def test_a_stack_of_pairs_is_as_good_as_one_after_another():
    cases = [Case(seed=seed) for seed in (0, 10, 20)]
    up, down, grad_up, grad_down = (
        torch.stack(items) for items in zip(*((c.B, c.A, *c.gradients) for c in cases), strict=True)
    )
    steps = Pair.of(up, down, cases[0].s, 0.0).optimal(grad_up, grad_down)
    for i, one in enumerate(cases):
        for together, alone in zip(steps, one.step("sylvester"), strict=True):
            assert_close(together[i], alone)


def test_float32_factors_are_projected_as_well_as_float32_allows(case):
    exact = case.equivalent("sylvester")
    pair = Pair.of(case.B.float(), case.A.float(), case.s)
    step = pair.optimal(*(item.float() for item in case.gradients))
    assert step[0].dtype == torch.float32
    left, right = pair.equivalent(*step)
    assert_close(left @ right, exact, 10)
