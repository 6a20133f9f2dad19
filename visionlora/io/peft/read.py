"""A PEFT adapter in our terms, as if one of our own files had been read.

Tensors are sorted by layer, the mapping of the method translates them, and what is left over are
trained base tensors: `modules_to_save` and biases.
"""

import re
from pathlib import Path

from torch import Tensor

from visionlora.errors import AdapterFileError, VisionLoraError
from visionlora.io.adapter_file import AdapterFile
from visionlora.io.known import KnownLayers
from visionlora.io.peft.config import PREFIX, PeftFile, read_peft
from visionlora.io.peft.mapping import Mapping, Source, find_mapping


def read_as_native(path: str | Path, known: KnownLayers) -> AdapterFile:
    """Read a PEFT adapter as the description and tensors of a native file.

    Raises:
        AdapterFileError: it is damaged, of an unsupported kind, or needs a base model that is not
            known.
    """
    return translate(read_peft(path), known)


def translate(file: PeftFile, known: KnownLayers) -> AdapterFile:
    """Return a parsed PEFT adapter in our terms (see `read_as_native`)."""
    mapping = find_mapping(file.kind)
    mapping.refuse_options(file.config)
    source, heads = sort_tensors(file, mapping, known)
    try:
        translation = mapping.read(source)
    except KeyError as error:
        raise AdapterFileError(f"{file.path} lacks tensor or option {error}") from error
    except VisionLoraError as error:
        raise AdapterFileError(f"{file.path}: {error}") from error
    except (AttributeError, ArithmeticError, LookupError) as error:
        raise AdapterFileError(f"{file.path} is inconsistent ({error})") from error
    except (TypeError, ValueError, RuntimeError, re.error) as error:
        raise AdapterFileError(f"{file.path} is inconsistent ({error})") from error
    if not translation.plan:
        raise AdapterFileError(f"{file.path} holds no tensor of a {file.kind} adapter")
    return AdapterFile(file.path, translation.plan, translation.tensors | heads, {}, {})


def sort_tensors(
    file: PeftFile, mapping: Mapping, known: KnownLayers
) -> tuple[Source, dict[str, Tensor]]:
    """Return the adapter's tensors by layer, and the trained base tensors.

    Raises:
        AdapterFileError: a bias sits inside the adapter.
    """
    marks = "|".join(sorted(mapping.marks, key=len, reverse=True))
    pattern = re.compile(rf"(?:(?P<layer>.*)\.)?(?P<name>(?:{marks})(?:[._].*)?)")
    layers: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for key, tensor in file.tensors.items():
        whole = not key.startswith(PREFIX)
        path = key.removeprefix(PREFIX).removeprefix("base_model." if whole else "")
        path = re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", path)
        found = pattern.fullmatch(path)
        if found is None:
            heads[f"base.{path}"] = tensor
            continue
        name = found["name"].removesuffix(".weight")
        if name.endswith(".bias") and "ln_tuning" not in name:
            raise AdapterFileError(f"{file.path}: a bias inside the adapter ({key}) is unsupported")
        owner = shared if found["layer"] is None else layers.setdefault(found["layer"], {})
        owner[name] = tensor
    return Source(file.config, layers, shared, known), heads
