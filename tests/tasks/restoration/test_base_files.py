"""Base files: ours and published ones come back as they were, and everything else is refused."""

import pytest
import torch

from tasks.restoration.networks.catalogue import NETWORKS, Spec
from tasks.restoration.networks.files import digest, load_base, save_base
from tasks.restoration.networks.published import guess
from visionlora.errors import ConfigError, DataError

UNEQUAL = Spec("nafnet", {"width": 8, "encoders": [1, 2], "middle": 3, "decoders": [2, 1]})
TINY = {"nafnet": UNEQUAL, "restormer": NETWORKS["restormer-tiny"]}


@pytest.fixture(params=TINY)
def spec(request):
    return TINY[request.param]


def test_a_saved_base_comes_back_with_its_facts(spec, tmp_path):
    model = spec.build()
    path = save_base(model, spec, tmp_path / "base.safetensors", mode="prod")
    base = load_base(path)
    assert base.spec == spec
    assert base.facts == {"mode": "prod"}
    assert base.digest == digest(model.state_dict())
    picture = torch.rand(1, 3, 16, 16)
    assert torch.equal(base.model(picture), model(picture))


@pytest.mark.parametrize("wrapper", [None, "params", "params_ema", "state_dict"])
def test_published_checkpoints_load_by_their_shapes(spec, wrapper, tmp_path):
    model = spec.build()
    tensors = {f"module.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path / "net.pth"
    torch.save({wrapper: tensors, "iter": 3} if wrapper else tensors, path)
    base = load_base(path)
    assert base.digest == digest(model.state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_are_read_off_the_tensors(name):
    with torch.device("meta"):
        model = NETWORKS[name].build()
        again = guess(model.state_dict()).build()
    shapes = [{k: v.shape for k, v in item.state_dict().items()} for item in (model, again)]
    assert shapes[0] == shapes[1]


def test_a_digest_knows_every_weight(spec):
    tensors = dict(spec.build().state_dict())
    first = digest(tensors)
    assert digest(dict(reversed(tensors.items()))) == first
    name = next(iter(tensors))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1e-6
    assert digest(tensors) != first


def test_fresh_weights_follow_from_the_seed():
    one, same, other = (load_base("nafnet-tiny:random", seed) for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest


def test_nafnet_equals_the_one_of_spandrel(tmp_path):
    spandrel = pytest.importorskip("spandrel", reason="spandrel is not installed")
    torch.manual_seed(0)
    model = UNEQUAL.build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("beta", "gamma")):
                parameter.normal_()
    path = tmp_path / "nafnet.pth"
    torch.save({"params": model.state_dict()}, path)
    peer = spandrel.ModelLoader().load_from_file(path).model.eval()
    picture = torch.rand(2, 3, 23, 37)
    with torch.no_grad():
        torch.testing.assert_close(model(picture), peer(picture), atol=1e-5, rtol=0)


def test_what_is_no_base_is_refused(tmp_path):
    text = tmp_path / "notes.pth"
    text.write_text("weights")
    other = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.ones(2)}, other)
    empty = tmp_path / "empty.pth"
    torch.save({"params": {}}, empty)
    broken = tmp_path / "broken.safetensors"
    saved = save_base(UNEQUAL.build(), UNEQUAL, tmp_path / "good.safetensors").read_bytes()
    broken.write_bytes(saved[:-100])
    with pytest.raises(DataError, match="not a file of weights"):
        load_base(text)
    with pytest.raises(DataError, match=r"neither NAFNet nor Restormer|no restoration network"):
        load_base(other)
    with pytest.raises(DataError, match="holds no weights"):
        load_base(empty)
    with pytest.raises(DataError, match="damaged"):
        load_base(broken)
    with pytest.raises(ConfigError, match="no base network 'tinny'"):
        load_base("tinny")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = UNEQUAL.build()
    with torch.no_grad():
        model.intro.weight[0] = float("nan")
    with pytest.raises(DataError, match=r"intro\.weight"):
        save_base(model, UNEQUAL, tmp_path / "base.safetensors")
    assert not list(tmp_path.iterdir())
