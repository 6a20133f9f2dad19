"""Adapt pretrained vision models with low-rank layers."""

from visionlora import methods
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
from visionlora.config import AdapterConfig
from visionlora.errors import VisionLoraError
from visionlora.groups import parameter_groups
from visionlora.io.convert import convert
from visionlora.io.export import ExportReport, export
from visionlora.io.inspect import AdapterInfo, inspect
from visionlora.io.native import adapter_state_dict, load, load_adapter_state_dict, save
from visionlora.ranks import finalize
from visionlora.registry import build_config, get_method, list_methods
from visionlora.summary import Summary, summary

__all__ = [
    "AdapterConfig",
    "AdapterInfo",
    "ExportReport",
    "Summary",
    "VisionLoraError",
    "adapter_state_dict",
    "build_config",
    "convert",
    "disabled",
    "eject",
    "export",
    "finalize",
    "freeze_base",
    "get_method",
    "inject",
    "inspect",
    "list_methods",
    "load",
    "load_adapter_state_dict",
    "merge",
    "merged",
    "methods",
    "parameter_groups",
    "save",
    "set_scale",
    "summary",
    "trainable_parameters",
    "unmerge",
    "use",
]
__version__ = "0.1.0"
