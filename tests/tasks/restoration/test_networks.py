"""NAFNet and Restormer: published counts and names, any size of picture, adapters on convs."""

import pytest
import torch

import visionlora as vl
from tasks.restoration.networks.catalogue import NETWORKS, Spec, find_network
from tasks.restoration.networks.nafnet import NAFNet
from tasks.restoration.networks.restormer import mirrored
from tests.tolerances import assert_close
from visionlora.errors import ConfigError

COUNTS = {
    "nafnet-tiny": 288_691,
    "nafnet-small": 640_011,
    "nafnet-32": 29_159_715,
    "nafnet-64": 115_982_915,
    "nafnet-gopro-32": 17_111_907,
    "nafnet-gopro-64": 67_888_835,
    "restormer": 26_126_644,
    "restormer-bias-free": 26_111_668,
    "restormer-tiny": 800_535,
}
UNEQUAL = Spec("nafnet", {"width": 16, "encoders": [1, 1, 2], "middle": 2, "decoders": [1, 1, 1]})
SMALL = ("nafnet-tiny", "restormer-tiny")


def awake(name):
    """Return a network whose blocks do something."""
    torch.manual_seed(0)
    model = find_network(name).build().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("beta", "gamma")):
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_as_many_as_published(name):
    with torch.device("meta"):
        model = NETWORKS[name].build()
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_stages_may_have_different_depths():
    with torch.device("meta"):
        model = UNEQUAL.build()
    assert sum(p.numel() for p in model.parameters()) == 438_387


def test_names_are_those_of_the_published_weights():
    nafnet = {name for name, _ in NETWORKS["nafnet-tiny"].build().named_parameters()}
    wanted = "intro.weight ending.bias encoders.0.0.conv2.weight downs.1.weight ups.2.0.weight"
    assert set(wanted.split()) <= nafnet
    assert {"middle_blks.0.sca.1.bias", "decoders.1.0.norm2.weight", "encoders.2.0.beta"} <= nafnet
    restormer = {name for name, _ in NETWORKS["restormer-tiny"].build().named_parameters()}
    wanted = "patch_embed.proj.weight down1_2.body.0.weight up4_3.body.0.weight output.weight"
    assert set(wanted.split()) <= restormer
    wanted = (
        "latent.0.attn.temperature encoder_level1.0.norm1.body.weight reduce_chan_level3.weight"
    )
    assert set(wanted.split()) <= restormer
    assert "refinement.0.ffn.project_in.weight" in restormer


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(16, 16), (17, 30), (9, 40), (1, 3)])
def test_a_picture_keeps_its_size(name, size):
    picture = torch.rand(1, 3, *size)
    with torch.no_grad():
        assert awake(name)(picture).shape == picture.shape


def test_blocks_of_a_fresh_nafnet_do_nothing():
    torch.manual_seed(0)
    model = NAFNet(8, [1], 1, [1])
    picture = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        before = model(picture)
        model.middle_blks[0].conv1.weight.mul_(3)
        model.encoders[0][0].sca[1].weight.mul_(3)
        assert torch.equal(model(picture), before)


def test_the_picture_itself_is_added():
    for name in SMALL:
        model = awake(name)
        last = model.ending if name.startswith("nafnet") else model.output
        picture = torch.rand(1, 3, 16, 24)
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.zero_()
            assert_close(model(picture), picture)


def test_mirroring_goes_back_and_forth():
    row = torch.arange(3.0).view(1, 1, 1, 3)
    assert mirrored(row, 0, 6).flatten().tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    assert mirrored(row, 2, 0)[0, 0].tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("name", SMALL)
def test_every_conv_can_be_adapted_and_folded(name):
    model = awake(name)
    picture = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        plain = model(picture)
        convs = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
        vl.inject(model, "lora", "type:Conv2d", rank=2)
        assert len(vl.adapter_state_dict(model)) == 2 * convs
        assert torch.equal(model(picture), plain)
        for key, parameter in vl.trainable_parameters(model):
            if key.endswith("B"):
                parameter.normal_(0, 0.05)
        adapted = model(picture)
        vl.eject(model, merge=True)
        assert not torch.allclose(adapted, plain, atol=1e-3)
        torch.testing.assert_close(model(picture), adapted, atol=1e-5, rtol=0)


def test_unknown_networks_are_named():
    with pytest.raises(ConfigError, match="did you mean 'nafnet-tiny'"):
        find_network("nafnet-tinny")
    with pytest.raises(ConfigError, match="unknown network family 'nafnett'"):
        Spec("nafnett", {}).build()
    with pytest.raises(ConfigError, match="nafnet cannot be built"):
        Spec("nafnet", {"depth": 3}).build()
