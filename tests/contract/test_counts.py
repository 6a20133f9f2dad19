"""Closed-form counts against the modules that ViT-B/16 would get, and against known figures."""

import pytest
import timm
import torch

import visionlora as vl
from visionlora.hosts import describe
from visionlora.registry import build_config
from visionlora.targets import find_targets

TARGETS = {"q and v": ["attn.qkv[q,v]"], "all linears": ["blocks.*"]}
METHODS = [name for name in vl.list_methods() if "linear" in vl.get_method(name).config.kinds]


@pytest.fixture(scope="module")
def sites():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    return {
        what: [
            describe(match.name, match.module, key)
            for match in find_targets(model, targets)
            for key in match.keys
        ]
        for what, targets in TARGETS.items()
    }


def closed_form(config, sites):
    method = vl.get_method(config.method)
    shared = 0 if method.shared is None else method.shared.parameter_count(config, sites)
    return shared + sum(method.delta.site_parameter_count(config, site) for site in sites)


@pytest.mark.parametrize("what", TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_the_modules_of_a_real_model_have_the_count(name, what, sites):
    method = vl.get_method(name)
    config = method.config()
    chosen = sites[what]
    assert len(chosen) == {"q and v": 24, "all linears": 48}[what]
    shared = None if method.shared is None else method.shared(config, chosen)
    count = sum(item.numel() for item in shared.parameters()) if shared is not None else 0
    with torch.device("meta"):  # shapes are all that counts
        for site in chosen:
            config.check_site(site)
            count += sum(item.numel() for item in method.delta(config, site, shared).parameters())
    assert count == closed_form(config, chosen) > 0


# The counts that papers and their code state for q and v of ViT-B/16.
@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("lora", {"rank": 8}, 294_912),
        ("vera", {"rank": 256}, 24_576),
        ("rand-lora", {"rank": 32}, 460_800),
        ("rand-lora", {"rank": 6}, 24 * 128 * (6 + 768)),
        ("nola", {"coefficients": 1024}, 49_152),
        ("fourier-ft", {"coefficients": 1000}, 24_000),
        ("loldu", {}, 18_432),
        ("lokr", {"rank": 8}, 24 * 1_088),
        ("lora-xs", {"rank": 8}, 24 * 64),
        ("uni-lora", {"rank": 4, "length": 72_000}, 72_000),
        ("dora", {"rank": 8}, 294_912 + 24 * 768),
        ("full", {}, 24 * 768 * 768),
    ],
)
def test_known_counts(name, options, count, sites):
    assert closed_form(build_config(name, options), sites["q and v"]) == count
