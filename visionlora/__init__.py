"""Adapt pretrained vision models with low-rank layers."""

from visionlora import analysis, dynamics, init, methods
from visionlora.api import (
    disabled,
    eject,
    freeze_base,
    inject,
    merge,
    merged,
    set_scale,
    trainable_parameters,
    unmerge,
    use,
)
from visionlora.compose import Recipe, parse
from visionlora.config import AdapterConfig
from visionlora.dynamics import catalogue as _catalogue  # noqa: F401  registers them
from visionlora.errors import VisionLoraError
from visionlora.freeze import freeze_routing
from visionlora.groups import parameter_groups
from visionlora.init.initialise import InitReport, initialise
from visionlora.io.convert import convert
from visionlora.io.export import ExportReport, export
from visionlora.io.inspect import AdapterInfo, inspect
from visionlora.io.integers import load_integers, save_integers
from visionlora.io.native import adapter_state_dict, load, load_adapter_state_dict, save
from visionlora.lean import make_lean
from visionlora.ranks import finalize
from visionlora.ranks.allocation import SqueezeReport
from visionlora.ranks.assigned import inject_ranks
from visionlora.ranks.bops import BopsReport, bops
from visionlora.ranks.combine import combine
from visionlora.ranks.squeeze import squeeze
from visionlora.registry import build_config, get_method, list_methods
from visionlora.summary import Summary, summary

__all__ = [
    "AdapterConfig",
    "AdapterInfo",
    "BopsReport",
    "ExportReport",
    "InitReport",
    "Recipe",
    "SqueezeReport",
    "Summary",
    "VisionLoraError",
    "adapter_state_dict",
    "analysis",
    "bops",
    "build_config",
    "combine",
    "convert",
    "disabled",
    "dynamics",
    "eject",
    "export",
    "finalize",
    "freeze_base",
    "freeze_routing",
    "get_method",
    "init",
    "initialise",
    "inject",
    "inject_ranks",
    "inspect",
    "list_methods",
    "load",
    "load_adapter_state_dict",
    "load_integers",
    "make_lean",
    "merge",
    "merged",
    "methods",
    "parameter_groups",
    "parse",
    "save",
    "save_integers",
    "set_scale",
    "squeeze",
    "summary",
    "trainable_parameters",
    "unmerge",
    "use",
]
__version__ = "0.1.0"
