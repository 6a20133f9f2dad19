"""The generator: it learns its tasks, tells them apart, and refuses what it cannot serve."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.generate import (
    CVAE,
    Generator,
    GeneratorConfig,
    SnapshotRecorder,
    TaskSnapshots,
    train_generator,
)
from visionlora.generate.cvae import negative_elbo
from visionlora.training import RunDirectory, TrainSettings, fit

WIDTH = 16
SNAPSHOTS = 8
SMALL = GeneratorConfig(
    channels=(8, 16), latent=4, lr=1e-2, batch_size=8, epochs=100, kl_weight=0.02
)
CONDITION = 16


def _vectors() -> list[torch.Tensor]:
    """Return unit vectors close to each other, as task vectors of CLIP are."""
    noise = torch.randn(2, CONDITION, generator=torch.Generator().manual_seed(3))
    return list(nn.functional.normalize(1 + 0.3 * noise, dim=1))


VECTORS = _vectors()


class Net(nn.Module):
    """Two layers; `width` of the first decides the architecture."""

    def __init__(self, width: int = WIDTH, name: str = "first") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.add_module(name, nn.Linear(width, WIDTH))
        self.second = nn.Linear(WIDTH, 12)


def snapshots(folder: Path, seed: int, model: nn.Module | None = None, **options) -> list[Path]:
    """Save adapters that scatter a little around one change, each with factors of its own."""
    model = Net() if model is None else model
    vl.inject(model, options.pop("method", "lora"), **{"rank": 2, **options})
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    centre = {name: noise(*item.shape) for name, item in vl.adapter_state_dict(model).items()}
    files = []
    for index in range(SNAPSHOTS):
        tensors = {name: item + 0.01 * noise(*item.shape) for name, item in centre.items()}
        for name in [name for name in tensors if name.endswith(".A")]:
            mix, other = noise(2, 2) + 2 * torch.eye(2), name.removesuffix("A") + "B"
            if tensors[name].shape[0] == 2:
                tensors[name] = torch.linalg.solve(mix, tensors[name])
                tensors[other] = tensors[other] @ mix
        vl.load_adapter_state_dict(model, tensors)
        files.append(vl.save(model, folder / f"step_{index}.safetensors"))
    return files


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[TaskSnapshots]:
    folder = tmp_path_factory.mktemp("snapshots")
    return [
        TaskSnapshots(name, VECTORS[index], snapshots(folder / name, index))
        for index, name in enumerate(("one", "two"))
    ]


@pytest.fixture(scope="module")
def generator(tasks, tmp_path_factory) -> Generator:
    torch.set_num_threads(1)
    return train_generator(tasks, SMALL, RunDirectory(tmp_path_factory.mktemp("run")), device="cpu")


def changes(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the changes of all sites as one vector."""
    sites = sorted({name.rpartition(".")[0] for name in tensors})
    return torch.cat([(tensors[f"{s}.B"] @ tensors[f"{s}.A"]).flatten() for s in sites])


def error(found: dict[str, torch.Tensor], file: Path) -> float:
    there = changes(safetensors.torch.load_file(file))
    return float((changes(found) - there).norm() / there.norm())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_reconstructs_the_changes_of_its_snapshots(generator, tasks):
    for task in tasks:
        for file in task.files:
            found = generator.reconstruct(safetensors.torch.load_file(file), task.vector)
            assert error(found, file) < 0.1


def test_it_generates_the_change_of_the_task_asked_for_and_of_no_other(generator, tasks):
    one, two = tasks
    for seed in range(3):
        for task, other in ((one, two), (two, one)):
            found = generator.generate(task.vector, seed=seed)
            assert error(found, task.files[-1]) < 0.2
            assert error(found, other.files[-1]) > 1


def test_a_generated_adapter_is_a_function_of_vector_and_seed(generator):
    state = torch.get_rng_state()
    assert same(generator.generate(VECTORS[0], seed=3), generator.generate(VECTORS[0], seed=3))
    assert not same(generator.generate(VECTORS[0], seed=3), generator.generate(VECTORS[0], seed=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_is_reproducible_and_leaves_the_global_stream_alone(tasks, tmp_path):
    short = GeneratorConfig(channels=(8,), latent=4, epochs=2)
    state = torch.get_rng_state()
    one, two = (
        train_generator(tasks, short, RunDirectory(tmp_path / name), device="cpu")
        for name in ("one", "two")
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one.network.state_dict(), two.network.state_dict())


def test_a_saved_generator_generates_the_same(generator, tmp_path):
    again = Generator.load(generator.save(tmp_path / "generator.safetensors"))
    assert same(again.generate(VECTORS[1], seed=5), generator.generate(VECTORS[1], seed=5))
    assert again.config == generator.config
    assert again.tasks == ("one", "two")


def test_a_written_adapter_is_loaded_like_any_other(generator, tmp_path):
    file = generator.write(tmp_path / "adapter.safetensors", VECTORS[0], seed=2)
    model, x = Net(), torch.randn(3, WIDTH)
    before = model.first.weight.clone()
    vl.load(model, file)
    tensors = generator.generate(VECTORS[0], seed=2)
    assert same(vl.adapter_state_dict(model), tensors)
    change = tensors["adapter.first.weight.B"] @ tensors["adapter.first.weight.A"]
    assert_close(model.first(x), nn.functional.linear(x, before + change, model.first.bias))


def test_apply_is_write_and_load(generator):
    model = generator.apply(Net(), VECTORS[0], seed=2, name="made")
    assert same(vl.adapter_state_dict(model, "made"), generator.generate(VECTORS[0], seed=2))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Net(width=20), "first.weight is 16 x 20 here and 16 x 16 in the file"),
        (lambda: Net(name="other"), "this Net has no layer 'first'"),
        (lambda: Net().double().apply(_perturb), "other base weights"),
    ],
)
def test_another_architecture_is_refused_and_untouched(generator, model, words):
    model = model()
    before = {name: item.clone() for name, item in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    with pytest.raises(AdapterFileError, match=words) as caught:
        generator.apply(model, VECTORS[0])
    assert "\n" not in str(caught.value)
    assert "the generator" in str(caught.value)
    assert [type(module) for module in model.modules()] == modules
    assert same(model.state_dict(), before)


def test_an_adapter_of_another_rank_is_refused_and_untouched(generator):
    model = vl.inject(Net(), "lora", rank=4)
    before = {name: item.clone() for name, item in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match="rank 4 in the model and 2"):
        generator.apply(model, VECTORS[0])
    assert same(model.state_dict(), before)


@torch.no_grad()
def _perturb(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.mul_(1.5)


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        (torch.zeros(4), r"tensor of 16 entries, got \(4,\)"),
        (torch.zeros(1, CONDITION), "tensor of 16 entries"),
        ([0.0] * CONDITION, "tensor of 16 entries, got list"),
        (torch.full((CONDITION,), torch.nan), "NaN or infinity"),
    ],
)
def test_a_wrong_task_vector_is_refused(generator, vector, words):
    with pytest.raises(ConfigError, match=words):
        generator.generate(vector)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 1}, "another architecture than .*step_7"),
        ({"alpha": 7.0}, "other options"),
        ({"targets": "first"}, "it lacks adapter.second"),
        ({"model": Net(name="other")}, "it lacks adapter.first"),
        ({"method": "lora-fa"}, "holds lora-fa; a generator learns from plain LoRA"),
        ({"model": Net().apply(_perturb)}, "other base weights"),
    ],
)
def test_snapshots_of_several_architectures_are_refused(tasks, tmp_path, options, words):
    odd = TaskSnapshots("odd", torch.ones(CONDITION), snapshots(tmp_path / "odd", 5, **options))
    with pytest.raises(AdapterFileError, match=words):
        train_generator([tasks[0], odd], SMALL, RunDirectory(tmp_path / "run"))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_tasks_that_cannot_be_told_apart_are_refused(tasks, tmp_path):
    run = RunDirectory(tmp_path)
    one, two = tasks
    with pytest.raises(ConfigError, match="at least two tasks, got 1"):
        train_generator([one], SMALL, run)
    with pytest.raises(ConfigError, match="share a name or a task vector"):
        train_generator([one, TaskSnapshots("two", one.vector, two.files)], SMALL, run)
    with pytest.raises(ConfigError, match="shape"):
        train_generator([one, TaskSnapshots("two", torch.ones(5), two.files)], SMALL, run)
    with pytest.raises(ConfigError, match="has no snapshots"):
        train_generator([one, TaskSnapshots("two", two.vector, [])], SMALL, run)


def test_a_generator_file_holds_tensors_and_json_and_nothing_else(generator, tmp_path):
    file = generator.save(tmp_path / "generator.safetensors")
    with safetensors.safe_open(file, "pt") as stream:
        header = json.loads(stream.metadata()["visionlora"])
    assert header["format"] == "visionlora-generator"
    assert b"pickle" not in file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_damaged_and_foreign_files_are_refused(generator, tasks, tmp_path):
    file = generator.save(tmp_path / "generator.safetensors")
    whole = file.read_bytes()
    with pytest.raises(AdapterFileError, match="no generator file"):
        Generator.load(tmp_path / "missing")
    with pytest.raises(AdapterFileError, match="format visionlora-adapter"):
        Generator.load(tasks[0].files[0])
    with pytest.raises(AdapterFileError, match="format visionlora-generator"):
        vl.load(Net(), file)
    torch.save({"network": 1}, tmp_path / "pickled")
    with pytest.raises(AdapterFileError, match="not a safetensors file"):
        Generator.load(tmp_path / "pickled")
    for part in (whole[: len(whole) // 2], whole[:20], b""):
        file.write_bytes(part)
        with pytest.raises(AdapterFileError, match="truncated"):
            Generator.load(file)
    tensors = safetensors.torch.load(whole)
    with safetensors.safe_open(_rewritten(file, whole), "pt") as stream:
        metadata = stream.metadata()
    del tensors["network.mean.weight"]
    safetensors.torch.save_file(tensors, file, metadata)
    with pytest.raises(AdapterFileError, match=r"damaged generator .*mean\.weight"):
        Generator.load(file)
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(AdapterFileError, match="damaged generator"):
        Generator.load(file)


def _rewritten(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


def test_a_failed_write_leaves_the_old_file(generator, tmp_path):
    file = generator.write(tmp_path / "adapter.safetensors", VECTORS[0])
    before = file.read_bytes()
    with pytest.raises(ConfigError):
        generator.write(file, torch.zeros(9))
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("channels", [(8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8), (12, 3)])
@pytest.mark.parametrize("length", [1, 100])
def test_the_network_keeps_the_length_and_every_parameter_gets_a_gradient(channels, length):
    network = CVAE(length, 5, channels, 6)
    assert (length + network.padding) % 2 ** len(channels) == 0
    x, c = torch.randn(2, length), torch.randn(2, 5)
    found, mean, log_variance = network(x, c)
    assert found.shape == x.shape
    assert mean.shape == log_variance.shape == (2, 6)
    negative_elbo(network, (x, c), 0.005).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


def test_the_loss_is_squared_error_plus_weighted_divergence():
    network = CVAE(10, 2, (4,), 3).eval()
    x, c = torch.randn(2, 10), torch.randn(2, 2)
    found, mean, log_variance = network(x, c)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    expected = (found - x).square().mean() + 0.3 * divergence.sum(1).mean()
    assert_close(negative_elbo(network, (x, c), 0.3), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"channels": ()},
        {"channels": (1,)},
        {"channels": 8},
        {"epochs": 0},
        {"epochs": "many"},
        {"lr": 0.0},
        {"latent": 0},
    ],
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        GeneratorConfig(**options)


def test_the_recorder_saves_the_last_states_of_a_run(tmp_path):
    model = vl.inject(Net(), "lora", "first", rank=2)
    data = torch.randn(4, WIDTH)
    recorder = SnapshotRecorder(model, tmp_path / "snapshots", steps=7, last=4, every=3)
    fit(
        model,
        torch.optim.SGD([p for _, p in vl.trainable_parameters(model)], lr=0.1),
        lambda m, batch: m.first(batch).square().mean(),
        lambda step: data,
        TrainSettings(steps=7, device="cpu"),
        RunDirectory(tmp_path / "run"),
        dynamics=[recorder],
    )
    assert [file.name for file in recorder.files] == [
        "step_000004.safetensors", "step_000007.safetensors",
    ]  # fmt: skip
    assert sorted(recorder.folder.iterdir()) == list(recorder.files)
    last, first = (safetensors.torch.load_file(file) for file in reversed(recorder.files))
    assert same(last, vl.adapter_state_dict(model))
    assert not same(last, first)


@pytest.mark.parametrize("last", [0, 8])
def test_the_recorder_refuses_more_steps_than_there_are(last):
    with pytest.raises(ConfigError, match="1 <= every <= last <= steps"):
        SnapshotRecorder(Net(), "nowhere", steps=7, last=last)


def test_a_snapshot_that_is_cut_off_is_named(tasks, tmp_path):
    files = [Path(shutil.copy(file, tmp_path / file.name)) for file in tasks[1].files]
    files[3].write_bytes(files[3].read_bytes()[:-10])
    with pytest.raises(AdapterFileError, match=r"step_3\.safetensors is truncated"):
        train_generator(
            [tasks[0], TaskSnapshots("two", VECTORS[1], files)], SMALL, RunDirectory(tmp_path / "r")
        )
