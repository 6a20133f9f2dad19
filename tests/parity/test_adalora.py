"""AdaLoRA against PEFT: the change, the penalty, and scores and masks after scripted steps."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.dynamics import StepContext, Stepper
from visionlora.ranks import controllers_of
from visionlora.ranks.structure import places_of

peft = pytest.importorskip("peft")

RANK, ALPHA, STEPS = 3, 5, 40


class Net(nn.Module):
    """A convolution and two linear layers; with targets, an object that has the loss."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2)
        self.wide = nn.Linear(16, 10)
        self.narrow = nn.Linear(10, 5)

    def forward(self, x, targets=None):
        output = self.narrow(torch.tanh(self.wide(self.conv(x).flatten(1))))
        if targets is None:
            return output
        return SimpleNamespace(loss=(output - targets).square().mean())


@pytest.fixture
def pair():
    """Return PEFT's model and ours with the same base and the same random adapter."""
    torch.manual_seed(0)
    base = Net().double()
    state = {key: item.clone() for key, item in base.state_dict().items()}
    config = peft.AdaLoraConfig(
        target_modules=["conv", "wide", "narrow"],
        init_r=RANK,
        target_r=1,
        lora_alpha=ALPHA,
        tinit=4,
        tfinal=10,
        deltaT=5,
        total_step=STEPS,
        beta1=0.8,
        beta2=0.7,
    )
    theirs = peft.get_peft_model(base, config).double()
    ours = Net().double()
    ours.load_state_dict(state)
    vl.inject(
        ours,
        "adalora",
        ["type:Conv2d", "type:Linear"],
        rank=RANK,
        target=1,
        alpha=ALPHA,
        warmup=0.1,
        final=0.25,
        interval=5,
        beta1=0.8,
        beta2=0.7,
    )
    with torch.no_grad():
        for place in places_of(ours):
            layer = theirs.get_submodule(f"base_model.model.{place.path}")
            for name, part in zip("PEQ", ("lora_B", "lora_E", "lora_A"), strict=True):
                value = torch.randn_like(place.delta.get_parameter(name))
                place.delta.get_parameter(name).copy_(value)
                target = getattr(layer, part)["default"]
                target.copy_(value.reshape(target.shape))
    return theirs, ours


def data(step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(7, 2, 6, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(7, 5, generator=generator, dtype=torch.float64)


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def loss_of(model):
    return lambda batch: model(*batch).loss


def test_change_and_output_agree(pair):
    theirs, ours = pair
    assert_close(ours(data(0)[0]), theirs(data(0)[0]))
    for place in places_of(ours):
        layer = theirs.get_submodule(f"base_model.model.{place.path}")
        change = layer.get_delta_weight("default")
        assert_close(place.delta.delta(place.host.view(place.key)), change.flatten(1))


def test_the_loss_with_its_orthogonality_term_agrees(pair):
    theirs, ours = pair
    (controller,) = controllers_of(ours, optimizer_of(ours), STEPS)
    context = StepContext(0, ours, controller.optimizer, replay=lambda: None)
    whole = loss_of(ours)(data(0)) + controller.penalty(context)
    assert_close(whole, theirs.base_model(*data(0)).loss)


def test_scores_and_masks_agree_after_scripted_steps(pair):
    theirs, ours = pair
    optimizer, other = optimizer_of(ours), optimizer_of(theirs)
    (controller,) = controllers_of(ours, optimizer, STEPS)
    stepper = Stepper(ours, optimizer, dynamics=[controller])
    for step in range(3):
        stepper.step([data(step)], loss_of(ours))
        theirs.base_model(*data(step)).loss.backward()
        theirs.base_model.update_and_allocate(step)
        other.step()
        other.zero_grad()
    allocator = theirs.base_model.rankallocator
    scores = controller.scores()
    for place in places_of(ours):
        prefix = f"{place.path}.lora_"
        parts = [allocator._element_score(f"{prefix}{part}.default") for part in "EBA"]
        expected = allocator._combine_ipt(
            parts[0], torch.cat([parts[1].mean(0)[:, None], parts[2].mean(1, keepdim=True)], 1)
        )
        assert_close(scores[place.name] / scores[place.name].max(), expected / expected.max())
        assert bool((expected > 0).all())
    for budget in (8, 5, 3):
        controller.choose(budget)
        pattern = allocator.mask_to_budget(theirs.base_model.model, budget)
        for place in places_of(ours):
            (kept,) = (item for name, item in pattern.items() if name.startswith(f"{place.path}."))
            assert (~controller.masks[place.name]).tolist() == kept
        assert sum(int((~mask).sum()) for mask in controller.masks.values()) == budget


def test_the_budget_of_every_step_agrees(pair):
    theirs, ours = pair
    (controller,) = controllers_of(ours, optimizer_of(ours), STEPS)
    allocator = theirs.base_model.rankallocator
    for step in range(STEPS):
        budget, due = allocator.budget_schedule(step)
        assert controller.budget(step) == budget
        if step <= STEPS - 10:
            assert controller.due(step) == (due or step == STEPS - 10)
