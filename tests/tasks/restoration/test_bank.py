"""Tasks share one network: each gets its own pictures, and the base is never lost."""

import random
import shutil

import pytest
import torch

import visionlora as vl
from tasks.restoration.bank import AdapterBank
from tasks.restoration.networks.catalogue import Spec
from tasks.restoration.networks.files import Base, digest
from tasks.restoration.training.adapter_folder import Card, load_adapter, save_adapter
from tests.tolerances import assert_close
from visionlora.errors import AdapterFileError, AdapterStateError
from visionlora.record import base_parameters

SPEC = Spec("nafnet", {"width": 4, "encoders": [1], "middle": 1, "decoders": [1]})
TASKS = {
    "denoise": ({"intro": 2, "middle_blks.0.conv2": 8, "ending": 3}, ("beta", "gamma")),
    "derain": ({"middle_blks.0.conv1": 2, "ending": 1}, ("bias", "norm1", "beta")),
    "dehaze": ({"intro": 1}, ()),
}
"""Ranks of layers, two of them whole weights, and vectors trained in place."""
PICTURE = torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(5))


def small_base(seed: int = 0) -> Base:
    """Return a network whose blocks do something; those of a fresh one are switched off."""
    torch.manual_seed(seed)
    model = SPEC.build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".beta", ".gamma")):
                parameter.normal_(0, 0.5)
    return Base(model, SPEC, "small", digest(model.state_dict()), {})


def made_adapter(task: str, base: Base) -> Base:
    """Give a network the adapter of a task, with random values in place of trained ones."""
    ranks, vectors = TASKS[task]
    vl.inject_ranks(base.model, ranks)
    vl.freeze_base(base.model, train=vectors)
    generator = torch.Generator().manual_seed(list(TASKS).index(task))
    with torch.no_grad():
        for _, parameter in vl.trainable_parameters(base.model):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return base


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for task in TASKS:
        base = made_adapter(task, small_base())
        trainable = sum(p.numel() for _, p in vl.trainable_parameters(base.model))
        total = sum(p.numel() for _, p in base_parameters(base.model))
        card = Card(
            task=task,
            method="colora",
            base=base.name,
            digest=base.digest,
            trainable=trainable,
            parameters=total,
        )
        (root / task).mkdir()
        save_adapter(base, card, root / task)
    return root


@pytest.fixture(scope="module")
def expected(folders):
    """What each task makes of the picture, on a network of its own; None is the base."""
    with torch.no_grad():
        pictures = {None: small_base().model(PICTURE)}
        for task in TASKS:
            alone = small_base()
            load_adapter(alone, folders / task)
            pictures[task] = alone.model(PICTURE)
    assert not any(
        torch.allclose(one, other, atol=1e-3)
        for one in pictures.values()
        for other in pictures.values()
        if one is not other
    )
    return pictures


@torch.no_grad()
def restored(bank: AdapterBank) -> torch.Tensor:
    return bank.model(PICTURE)


def full_bank(folders) -> AdapterBank:
    bank = AdapterBank(small_base())
    for task in TASKS:
        assert bank.add(task, folders / task).task == task
    return bank


def assert_is_base(bank: AdapterBank) -> None:
    there = small_base().model.state_dict()
    for name, value in base_parameters(bank.model):
        assert torch.equal(value, there[name]), name


def test_each_task_is_what_it_is_on_a_network_of_its_own(folders, expected):
    bank = full_bank(folders)
    assert bank.active is None
    for task in TASKS:
        bank.activate(task)
        assert bank.active == task
        assert torch.equal(restored(bank), expected[task]), task


@pytest.mark.parametrize("seed", range(5))
def test_the_base_is_there_after_any_sequence(folders, expected, seed):
    draw = random.Random(seed)
    bank, waiting = AdapterBank(small_base()), list(TASKS)
    draw.shuffle(waiting)
    for _ in range(14):
        step = draw.choice(["add", "on", "on", "off"])
        before = bank.active
        if step == "add" and waiting:
            task = waiting.pop()
            bank.add(task, folders / task)
            assert bank.active == before
        elif step == "on" and bank.cards:
            bank.activate(draw.choice(list(bank.cards)))
        else:
            bank.deactivate()
        assert torch.equal(restored(bank), expected[bank.active])
    bank.deactivate()
    assert_is_base(bank)
    assert digest(vl.eject(bank.model).state_dict()) == bank.base.digest


def test_a_vector_of_one_task_does_not_stay_for_the_next(folders):
    bank = full_bank(folders)
    own = small_base().model
    bank.activate("derain")
    assert not torch.equal(bank.model.intro.bias, own.intro.bias)
    bank.activate("denoise")  # trains beta and gamma, and no bias
    assert torch.equal(bank.model.intro.bias, own.intro.bias)
    assert not torch.equal(bank.model.middle_blks[0].gamma, own.middle_blks[0].gamma)
    bank.activate("dehaze")  # trains no vector
    assert_is_base(bank)


def test_nothing_is_left_to_train(folders):
    bank = full_bank(folders)
    bank.activate("derain")
    assert not any(value.requires_grad for _, value in base_parameters(bank.model))


def test_the_active_task_can_be_merged(folders, expected):
    bank = full_bank(folders)
    bank.activate("denoise")
    with vl.merged(bank.model):
        assert_close(restored(bank), expected["denoise"])
        for refused in (bank.deactivate, lambda: bank.activate("derain")):
            with pytest.raises(AdapterStateError, match="merged"):
                refused()
    assert torch.equal(restored(bank), expected["denoise"])
    bank.deactivate()
    assert_is_base(bank)


def test_an_adapter_that_is_refused_changes_nothing(folders, expected, tmp_path):
    bank = AdapterBank(small_base())
    bank.add("denoise", folders / "denoise")
    bank.activate("denoise")
    damaged = tmp_path / "damaged"
    shutil.copytree(folders / "derain", damaged)
    weights = next(damaged.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    for folder in (damaged, tmp_path / "nowhere"):
        with pytest.raises(AdapterFileError):
            bank.add("derain", folder)
        assert list(bank.cards) == ["denoise"]
        assert torch.equal(restored(bank), expected["denoise"])
    bank.add("derain", folders / "derain")  # the name is not taken by what was refused
    other = AdapterBank(small_base(seed=1))
    with pytest.raises(AdapterFileError, match="adapter of small"):
        other.add("denoise", folders / "denoise")
    assert not other.cards


def test_names_are_checked(folders):
    bank = full_bank(folders)
    with pytest.raises(AdapterStateError, match="did you mean 'denoise'"):
        bank.activate("denoize")
    with pytest.raises(AdapterStateError, match="'derain' already"):
        bank.add("derain", folders / "derain")
