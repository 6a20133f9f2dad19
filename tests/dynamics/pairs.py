"""Small networks whose pairs LoRA-Pro trains."""

import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.dynamics import Stepper
from visionlora.dynamics.lora_pro import LoRAProConfig
from visionlora.ranks.structure import places_of

WIDTH, OUT = 6, 6


def exactly(**options):
    """LoRA-Pro without regularisation, for identities."""
    return LoRAProConfig(ridge=0.0, **options)


class Net(nn.Module):
    """Two layers of other shapes, whose order of registration may be turned round."""

    def __init__(self, turned=False, head=False):
        super().__init__()
        names = ["last", "first"] if turned else ["first", "last"]
        for name in names:
            shape = {"first": (WIDTH, 7), "last": (7, OUT)}[name]
            self.add_module(name, nn.Linear(*shape))
        if head:
            self.head = nn.Linear(OUT, OUT, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def network(**options):
    torch.default_generator.manual_seed(0)
    net = Net(**options).double()
    values = Net().double()
    values.load_state_dict({k: normal(*v.shape, seed=i) for i, (k, v) in enumerate(shapes())})
    net.load_state_dict(values.state_dict(), strict=False)
    return net


def shapes():
    return Net().state_dict().items()


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) / max(shape[-1], 1) ** 0.5


def adapted(method="lora", net=None, seeded=True, **options):
    """Return the network with an adapter; with `seeded` every pair starts at random values."""
    model = vl.inject(network() if net is None else net, method, ["first", "last"], **options)
    if seeded:
        for place in places_of(model):
            with torch.no_grad():
                start = len(place.path)  # other values at every site, whatever their order
                place.delta.A.copy_(normal(*place.delta.A.shape, seed=start))
                place.delta.B.copy_(normal(*place.delta.B.shape, seed=start + 100))
    return model


DATA = normal(32, WIDTH, seed=11) * WIDTH**0.5
TARGETS = normal(32, OUT, seed=12) * OUT**0.5


def loss_of(model):
    return lambda rows: (model(DATA[rows]) - TARGETS[rows]).square().mean()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def trainer(model, config, lr=1e-2, optimizer=torch.optim.AdamW, weight_decay=0.0, **options):
    optimiser = optimizer(trained(model), lr=lr, weight_decay=weight_decay)
    return Stepper(model, optimiser, dynamics=[config.build(model, optimiser, 100)], **options)


def train(model, config, steps=4, **options):
    stepper = trainer(model, config, **options)
    for _ in range(steps):
        stepper.step([slice(None)], loss_of(model))
    return stepper


def weights(model):
    """Return the weight that every adapted layer has with its change."""
    return {
        place.path: place.host.view(place.key)
        + place.host.state.strengths[place.adapter] * place.delta.delta(place.host.view(place.key))
        for place in places_of(model)
    }


def assert_same_weights(one, other, factor=1.0):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for path, weight in one.items():
        assert_close(weight.detach(), other[path].detach(), factor)


def gradients_of_weights(model):
    """Return dL/dW of the merged model, by layer."""
    plain = network()
    for path, weight in weights(model).items():
        plain.get_submodule(path).weight.data.copy_(weight.detach())
    loss_of(plain)(slice(None)).backward()
    return {path: plain.get_submodule(path).weight.grad for path in weights(model)}


def full_training(reference, kind, lr, steps):
    """Train the weights of a plain network that starts where an adapted one does."""
    plain = network()
    for path, weight in weights(reference).items():
        plain.get_submodule(path).weight.data.copy_(weight.detach())
    plain.requires_grad_(False)
    own = [plain.get_submodule(path).weight.requires_grad_() for path in weights(reference)]
    optimizer = kind(own, lr=lr, **({"weight_decay": 0.0} if kind is torch.optim.AdamW else {}))
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(plain)(slice(None)).backward()
        optimizer.step()
    return plain
