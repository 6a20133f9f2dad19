"""Does an adapter file fit a model: each check raises `AdapterFileError` and changes nothing."""

from torch import Tensor, nn

from visionlora.errors import AdapterFileError, VisionLoraError, nearest
from visionlora.hosts import describe
from visionlora.io import contents
from visionlora.io.adapter_file import AdapterFile
from visionlora.methods.base import Delta
from visionlora.sites import Site

# Weights cast to half precision still count as the same base model.
_BASE_TOLERANCE = 2e-2


def check_sites(model: nn.Module, file: AdapterFile) -> None:
    """Refuse a model that lacks a site of the file or has it in another shape."""
    modules = dict(model.named_modules())
    kind = type(model).__name__
    for site, _ in file.plan:
        module = modules.get(site.module)
        if module is None:
            raise AdapterFileError(
                f"{file.path} is for another model: this {kind} has no layer {site.module!r}"
                f"{nearest(site.module, modules)}"
            )
        try:
            here = describe(site.module, module, site.key)
        except (VisionLoraError, StopIteration, KeyError) as error:
            raise AdapterFileError(
                f"{file.path} is for another model: {site.module} is a {type(module).__name__} here"
            ) from error
        if not contents.same_site(here, site):
            raise AdapterFileError(
                f"{file.path} is for another model: {site.name} is {_view(here, site)} here and "
                f"{_view(site, here)} in the file"
            )


def _view(site: Site, other: Site) -> str:
    """Return the size of a site, or all that tells it from another one of that size."""
    size = f"{site.out_features} x {site.in_features}"
    if (site.out_features, site.in_features) != (other.out_features, other.in_features):
        return size
    rows = f", rows {site.rows[0]} to {site.rows[1]}" if site.rows else ""
    return f"{size} ({site.kind}, {site.groups} groups{rows})"


def check_base(model: nn.Module, file: AdapterFile) -> None:
    """Refuse a model whose adapted weights are not those the adapter was trained on."""
    here = contents.base_figures(model, [site for site, _ in file.plan])
    for name, there in file.base.items():
        norm = max(abs(there[0]), 1e-12)
        close = abs(here[name][0] - there[0]) <= _BASE_TOLERANCE * norm and all(
            abs(one - other) <= _BASE_TOLERANCE * max(abs(other), 1e-3 * norm)
            for one, other in zip(here[name][1:], there[1:], strict=True)
        )
        if not close:
            raise AdapterFileError(
                f"{file.path} was trained on other base weights: {name} differs; load the weights "
                "it was trained on, or pass check_base=False"
            )


def check_seeded(file: AdapterFile, seeded: dict[str, Tensor]) -> None:
    """Refuse seeded tensors that came out differently and are not stored in the file."""
    for key, there in file.frozen.items():
        if key in file.tensors:
            continue
        here = contents.fingerprint(seeded[key]) if key in seeded else []
        # A file may hold fewer figures than are compared today, but never more.
        if not 0 < len(there) <= len(here) or any(
            abs(one - other) > 1e-6 * max(1.0, abs(other))
            for one, other in zip(here, there, strict=False)
        ):
            raise AdapterFileError(
                f"seeded tensor {key} differs from the one trained with; save again with "
                "frozen=True where it was trained"
            )


def check_meaning(file: AdapterFile, placed: list[tuple[str, Delta]]) -> None:
    """Refuse values for an adapter that is there with other options, such as another scale."""
    there = {site.name: config for site, config in file.plan}
    for path, delta in placed:
        here = delta.config.meaning()
        for key, value in (there[path].meaning() if path in there else {}).items():
            if here.get(key) != value:
                raise AdapterFileError(
                    f"{path} has {key} {here.get(key)!r} in the model and {value!r} in the file; "
                    "load it under another name"
                )


def check_fit(tensors: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    """Raise unless both have the same keys and shapes."""
    unknown = [key for key in tensors if key not in targets]
    missing = [key for key in targets if key not in tensors]
    if unknown:
        raise AdapterFileError(
            f"unknown tensor {unknown[0]}{nearest(unknown[0], targets)} ({len(unknown)} in all)"
        )
    if missing:
        raise AdapterFileError(f"missing tensor {missing[0]} ({len(missing)} in all)")
    for key, target in targets.items():
        if target.shape != tensors[key].shape:
            raise AdapterFileError(
                f"{key} has shape {tuple(tensors[key].shape)}, this model needs "
                f"{tuple(target.shape)}"
            )
