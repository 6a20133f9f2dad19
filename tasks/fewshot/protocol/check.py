"""What a protocol refuses before anything is written or trained, and what it says beforehand."""

from collections.abc import Iterator

from tasks.fewshot.backbones import Backbone
from tasks.fewshot.config import AUTO
from tasks.fewshot.datasets import Dataset, load_dataset
from tasks.fewshot.experiment import Experiment, prepare
from tasks.fewshot.protocol.config import ProtocolConfig
from tasks.fewshot.protocol.rates import check_validation, trials
from tasks.fewshot.protocol.transfer import as_target
from tasks.fewshot.rate_search import check_spare, require_optuna
from tasks.fewshot.sampling import short_classes
from visionlora.errors import ConfigError, DataError, VisionLoraError


def load_all(names: list[str], config: ProtocolConfig) -> dict[str, Dataset]:
    """Read all data sets, and say at once which ones cannot be used."""
    found: dict[str, Dataset] = {}
    missing: dict[str, VisionLoraError] = {}
    for name in names:
        try:
            found[name] = load_dataset(name, config.root, config.own_split)
        except VisionLoraError as error:
            missing[name] = error
    if missing:
        first, *others = missing
        if not others:
            raise missing[first]
        raise DataError(f"{missing[first]}; nor can be used: {', '.join(others)}")
    return found


def check(config: ProtocolConfig, backbone: Backbone, datasets: dict[str, Dataset]) -> None:
    """Refuse what cannot be used, before anything is written or trained.

    Raises:
        VisionLoraError: naming the data set or the method.
    """
    first = config.cells()[0]
    if config.transfers and not backbone.has_text:
        raise ConfigError(f"{config.name} needs a text tower, which timm backbones lack")
    sources: dict[str, Experiment] = {}
    for cell in config.cells():
        # A method meets the backbone, a data set its classes and prompts: no need to try all pairs.
        in_first = (cell.shots, cell.dataset) == (first.shots, first.dataset)
        if in_first or cell.dataset not in sources:
            settings = config.cell(cell.method, cell.dataset, cell.shots)
            sources[cell.dataset] = prepare(settings, datasets[cell.dataset], backbone)
    if AUTO in (config.lr or ()):
        require_optuna()
        for name in sources:
            check_spare(datasets[name], min(config.all_shots))
    if trials(config, first.dataset, first.method):
        for name in sources:
            check_validation(datasets[name])
    if config.transfers:
        for name in config.datasets:
            as_target(config, sources[first.dataset], datasets[name])


def shortcomings(config: ProtocolConfig, datasets: dict[str, Dataset]) -> Iterator[str]:
    """Say which data sets are not what their name promises: own splits, classes that are short."""
    for name in dict.fromkeys(cell.dataset for cell in config.cells()):
        dataset, most = datasets[name], max(config.all_shots)
        if short := short_classes(dataset.train, most):
            what = "all are used" if config.short_class == "keep" else "some are repeated"
            yield (
                f"{len(short)} of {len(dataset.classes)} classes of {name} have fewer than {most} "
                f"training images: {what}."
            )
    if own := [name for name, dataset in datasets.items() if dataset.split == "own"]:
        yield f"Own split, not comparable with published figures: {', '.join(own)}."
