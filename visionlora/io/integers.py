"""Adapter files with integer factors: what Bayesian-LoRA found, in as many bits as it needs.

`save_integers` writes, for every site, the levels of both factors (two and four bits packed into
bytes), the ends of their ranges and the diagonal E. `load_integers` multiplies them out and adds
them to a model as plain LoRA:

    B = s_B k_B,   A = diag(E) s_A k_A,   s_b = 2 beta / (2^b - 1)
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from visionlora.build import install, prepare_adapter, refuse_merged
from visionlora.config import AdapterConfig
from visionlora.errors import AdapterFileError, AdapterStateError, VisionLoraError
from visionlora.io import checks, contents
from visionlora.io.adapter_file import AdapterFile, read_site
from visionlora.io.atomic import write_atomically
from visionlora.methods.parts.noise import without_noise
from visionlora.ops.quantize import from_levels, pack, to_levels, unpack
from visionlora.ranks.squeeze import choose
from visionlora.ranks.structure import places_of
from visionlora.registry import build_config
from visionlora.sites import Site

_FORMAT = "visionlora-integers"
_VERSION = 1


def save_integers(model: nn.Module, path: str | Path, *, name: str | None = None) -> Path:
    """Write the quantised factors of a Bayesian-LoRA adapter as integers.

    Gates count as evaluation decides them; the model stays as it is.

    Raises:
        AdapterStateError: no such adapter, or it is of another method.
        AdapterFileError: a tensor holds NaN or infinity.
        OutputError: the file cannot be written.
    """
    name = choose(model, name)
    for place in places_of(model, name):
        if place.delta.config.method != "bayesian-lora":
            raise AdapterStateError(
                f"save_integers: {place.name or 'the layer'} is {place.delta.config.method}, and "
                "only bayesian-lora has integer factors"
            )
    tensors: dict[str, Tensor] = {}
    entries, sites = [], []
    for place in places_of(model, name):
        delta: Any = place.delta
        rank = delta.effective_rank
        site = dataclasses.replace(place.site, module=place.path)
        bits = {key: delta.bits(key) for key in "AB"}
        for key, width in bits.items():
            beta = delta.beta(key).detach()
            with torch.no_grad(), without_noise(delta):
                values = delta.quantized(key)
            values = values[:rank] if key == "A" else values[:, :rank]
            levels = to_levels(values, beta, width)
            tensors[f"{site.name}.{key}"] = pack(levels.cpu(), width)
            tensors[f"{site.name}.range_{key}"] = beta.cpu()
        tensors[f"{site.name}.E"] = delta.E.detach()[:rank].cpu()
        form = {"rank": rank, "bits": bits, "scale": delta.scale}
        entries.append({"site": dataclasses.asdict(site), **form})
        sites.append(site)
    contents.refuse_non_finite(tensors, "cannot save")
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "sites": entries,
        "base": contents.base_figures(model, sites),
    }
    data = safetensors.torch.save(tensors, {"visionlora-integers": json.dumps(header)})
    return write_atomically(path, lambda temporary: _write(temporary, data))


def load_integers(
    model: nn.Module, path: str | Path, *, name: str = "default", check_base: bool = True
) -> nn.Module:
    """Add the adapter of an integer file to a model, as plain LoRA.

    Args:
        model: the base model.
        path: a file written by `save_integers`.
        name: name that the adapter gets.
        check_base: refuse a base model whose adapted weights differ from those trained on.

    Raises:
        AdapterFileError: the file is unreadable, inconsistent, or for another model; the model is
            untouched.
    """
    file = read_integers(path)
    refuse_merged(model, "load")
    checks.check_sites(model, file)
    if check_base:
        checks.check_base(model, file)
    try:
        prepared = prepare_adapter(model, file.plan, name=name)
    except VisionLoraError as error:
        raise AdapterFileError(f"{file.path}: {error}") from error
    placed = [(s.name, d) for group in prepared.deltas.values() for s, d in group.values()]
    install(model, prepared)
    with torch.no_grad():
        for key, parameter in contents.trained_tensors(placed, None).items():
            parameter.copy_(file.tensors[key])
    return model


def read_integers(path: str | Path) -> AdapterFile:
    """Read an integer file as the plain LoRA adapter that it stands for, in float64.

    Raises:
        AdapterFileError: it is missing, truncated, of another format, or inconsistent.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            stored = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} is no readable safetensors file ({error})") from error
    if "visionlora-integers" not in metadata:
        raise AdapterFileError(f"{path} holds no integer adapter")
    plan: list[tuple[Site, AdapterConfig]] = []
    tensors: dict[str, Tensor] = {}
    try:
        header = json.loads(metadata["visionlora-integers"])
        if header["version"] > _VERSION:
            raise AdapterFileError(
                f"{path} has version {header['version']}; this version of visionlora reads "
                f"integer files up to version {_VERSION}"
            )
        for entry in header["sites"]:
            site = read_site(entry["site"])
            rank = int(entry["rank"])
            options = {"rank": rank, "alpha": float(entry["scale"]) * rank}
            plan.append((site, build_config("lora", options)))
            up = _factor(stored, site, "B", entry["bits"]["B"], (site.out_features, rank))
            down = _factor(stored, site, "A", entry["bits"]["A"], (rank, site.in_features))
            tensors[f"adapter.{site.name}.B"] = up
            tensors[f"adapter.{site.name}.A"] = stored[f"{site.name}.E"].double()[:, None] * down
        base = {key: [float(value) for value in row] for key, row in header["base"].items()}
    except AdapterFileError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise AdapterFileError(f"{path} has a damaged description ({error})") from error
    contents.refuse_non_finite(tensors, str(path))
    return AdapterFile(path, plan, tensors, {}, base)


def _factor(
    stored: dict[str, Tensor], site: Site, key: str, bits: int, shape: tuple[int, int]
) -> Tensor:
    levels = unpack(stored[f"{site.name}.{key}"], bits, shape)
    if tuple(levels.shape) != shape:
        raise ValueError(f"{site.name}.{key} has shape {tuple(levels.shape)}, not {shape}")
    return from_levels(levels, stored[f"{site.name}.range_{key}"], bits)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
