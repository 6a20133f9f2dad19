"""Tables of starts and dynamics, and of what composes: the validator is asked for every product."""

import dataclasses
import inspect
import re
from collections.abc import Iterable, Sequence

import visionlora as vl
from visionlora.dynamics.config import DynamicsConfig
from visionlora.errors import ConfigError
from visionlora.init.base import Initialiser
from visionlora.registry import list_dynamics, list_initialisers, list_presets

Factor = type[Initialiser] | type[DynamicsConfig]

LOOKS_AT = {
    "gradient": "gradients",
    "covariance": "inputs",
    "components": "inputs",
}


def starts() -> str:
    """Return the table of initialisers."""
    known = list_initialisers()
    rows = ["| start | what it is | looks at | taken off | presets | options |", "|" + "---|" * 6]
    for name, kind in known.items():
        seen = ", ".join(sorted({LOOKS_AT[need] for need in kind.needs})) or "the weight"
        taken = "yes" if kind().residual else "no"
        if any(_varied(kind, option).residual != kind().residual for option in _flags(kind)):
            taken = "if asked"
        cells = [f"`{name}`", _summary(kind, known.values()), seen, taken, *_use(name, kind)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def dynamics() -> str:
    """Return the table of dynamics."""
    known = list_dynamics()
    rows = ["| dynamics | what it is | presets | options |", "|" + "---|" * 4]
    for name, kind in known.items():
        cells = [f"`{name}`", _summary(kind, known.values()), *_use(name, kind)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def compatibility() -> str:
    """Return which factor each form of method takes, and why not."""
    forms: dict[str, list[str]] = {}
    for method in vl.list_methods():
        forms.setdefault(vl.get_method(method).config.form, []).append(method)
    other = forms.pop("other")
    columns = [*sorted(forms.values(), key=lambda names: names[0] != "lora"), other]
    heads = [", ".join(f"`{name}`" for name in names) for names in columns[:-1]]
    factors = [*list_initialisers(), *list_dynamics()]
    rows = [f"| | {' | '.join(heads)} | the {len(other)} others |", "|" + "---|" * (len(heads) + 2)]
    notes: dict[str, int] = {}
    for name in factors:
        cells = [_cell(name, names, notes) for names in columns]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    reasons = [f"{number}. {_sentence(reason)}" for reason, number in notes.items()]
    return "\n".join(rows) + "\n\n" + "\n".join(reasons)


def exclusions() -> str:
    """Return the pairs of factors that exclude each other."""
    factors = [*list_initialisers(), *list_dynamics()]
    rows = ["| | with | why not |", "|---|---|---|"]
    for index, one in enumerate(factors):
        for other in factors[index + 1 :]:
            if one in list_initialisers() and other in list_initialisers():
                continue
            takes = [m for m in vl.list_methods() if not (_refusal(m, one) or _refusal(m, other))]
            whys = [_refusal(method, one, other) for method in takes]
            if whys and all(whys):
                rows.append(f"| `{one}` | `{other}` | {_sentence(whys[0] or '')} |")
    return "\n".join(rows)


def _cell(name: str, methods: Sequence[str], notes: dict[str, int]) -> str:
    """Return yes, or no with the number of the reason."""
    refusals = [_refusal(method, name) for method in methods]
    whys = dict.fromkeys(why for why in refusals if why)
    if not whys:
        return "yes"
    numbers = ", ".join(map(str, sorted(notes.setdefault(why, len(notes) + 1) for why in whys)))
    allowed = [m for m, why in zip(methods, refusals, strict=True) if not why]
    if not allowed:
        return f"no ({numbers})"
    refused = [m for m, why in zip(methods, refusals, strict=True) if why]
    few = f"all but {', '.join(refused)}" if len(refused) < len(allowed) else ""
    return f"{few or ', '.join(allowed) + ' only'} ({numbers})"


def _refusal(method: str, *names: str) -> str | None:
    """Return why the validator refuses a product, None if it takes it."""
    try:
        vl.parse("+".join([method, *names]))
    except ConfigError as error:
        text = str(error)
        return re.sub(rf"^\S+ cannot (?:start|train) {re.escape(method)}: ", "", text)
    return None


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _summary(kind: Factor, known: Iterable[Factor]) -> str:
    """Return the title of the module, or that of the class where a module has several."""
    alone = sum(other.__module__ == kind.__module__ for other in known) == 1
    text = inspect.getmodule(kind) if alone else kind
    title = inspect.cleandoc(text.__doc__ or "").split("\n", 1)[0].rstrip(".")
    title = re.sub(r"^[\w+-]+(?: [\w-]+)*: ", "", title) if alone else title
    return title[0].upper() + title[1:]


def _use(name: str, kind: Factor) -> list[str]:
    """Return the presets of a factor and its options with defaults."""
    presets = [item for item in list_presets() if name in item.factors]
    products = [f"`{item.name}` = `{'+'.join([item.method, *item.factors])}`" for item in presets]
    options = ", ".join(f"`{key}={value}`" for key, value in vars(kind()).items())
    return [", ".join(products) or "-", options or "-"]


def _flags(kind: type[Initialiser]) -> list[str]:
    return [item.name for item in dataclasses.fields(kind) if item.default is False]


def _varied(kind: type[Initialiser], flag: str) -> Initialiser:
    return kind(**{flag: True})
