"""Methods by name, typed options, and errors that name the nearest allowed thing."""

import dataclasses

import pytest

import visionlora as vl
from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.registry import list_presets


@pytest.mark.parametrize("name", vl.list_methods())
def test_a_method_documents_itself_and_its_options_round_trip(name):
    method = vl.get_method(name)
    assert method.config.method == name
    assert method.summary.endswith(".")
    assert "Trained" in method.documentation
    assert "merge" in method.documentation.lower()
    config = vl.build_config(name)
    options = config.to_dict()
    assert options.pop("method") == name
    assert vl.build_config(name, options) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3


def test_patterns_list_methods():
    assert vl.list_methods("lora*") == [n for n in vl.list_methods() if n.startswith("lora")]
    assert vl.list_methods("no-such-*") == []


PLAIN = [preset for preset in list_presets() if not preset.factors]
COMPOSED = [preset for preset in list_presets() if preset.factors]


@pytest.mark.parametrize("preset", PLAIN, ids=lambda preset: preset.name)
def test_a_preset_is_its_method_with_options_that_can_be_overridden(preset):
    config = vl.build_config(preset.name)
    assert config.method == preset.method
    assert config == vl.build_config(preset.method, dict(preset.options))
    key = next(iter(preset.options))
    plain = getattr(vl.build_config(preset.method), key)
    assert getattr(vl.build_config(preset.name, {key: plain}), key) == plain


@pytest.mark.parametrize("preset", COMPOSED, ids=lambda preset: preset.name)
def test_a_preset_with_factors_is_the_product_that_it_names(preset):
    recipe = vl.parse(preset.name)
    product = vl.parse("+".join([preset.method, *preset.factors]))
    assert recipe.factors == product.factors
    assert recipe.config() == product.config(**preset.options)
    with pytest.raises(ConfigError, match=r"is .*, more than the configuration of a method"):
        vl.build_config(preset.name)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("lroa", {}, "'lora'"),
        ("block_lora", {}, "'block-lora'"),
        ("rslroa", {}, "'rslora'"),
        ("quantum", {}, "known: "),
        ("", {}, "known: "),
        ("lora", {"rnk": 4}, "'rank'"),
        ("lora", {"lora_alpha": 4}, "alpha"),
        ("lora", {"rank": "8"}, "whole number"),
        ("lora", {"rank": 8.0}, "whole number"),
        ("lora", {"rank": True}, "whole number"),
        ("lora", {"rank": 0}, "at least 1"),
        ("lora", {"rank": -1}, "at least 1"),
        ("lora", {"dropout": 1.0}, "[0, 1)"),
        ("lora", {"dropout": -0.1}, "[0, 1)"),
        ("lora", {"dropout": float("nan")}, "finite number"),
        ("lora", {"alpha": float("nan")}, "finite number or None"),
        ("lora", {"alpha": float("inf")}, "finite number or None"),
        ("lora", {"scaling": "rs"}, "'rslora'"),
        ("lora-xs", {"init": "kaiming"}, "'normal'"),
        ("lora", {"alpha": "16"}, "a finite number or None"),
        ("lora", {"seed": 0.5}, "whole number"),
        ("vera", {"rank": 0}, "at least 1"),
        ("vera", {"dropout": 2.0}, "[0, 1)"),
        ("block-lora", {"rank": 4, "blocks": 3}, "3 blocks"),
        ("block-lora", {"blocks": 0}, "at least 1"),
        ("block-lora", {"layout": "column"}, "'grid'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(method, options, said):
    with pytest.raises(ConfigError) as caught:
        vl.build_config(method, options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_configuration_is_keyword_only_and_hashable():
    for name in vl.list_methods():
        kind = vl.get_method(name).config
        assert issubclass(kind, AdapterConfig)
        with pytest.raises(TypeError):
            kind(4)
        assert hash(kind()) == hash(kind())
