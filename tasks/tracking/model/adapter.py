"""The adapter of a tracker: any method of the registry on every linear layer of the blocks.

LoRAT's own recipe is `lorat`: LoRA whose factors both start from N(0, 0.02^2), so that the change
is small but not zero before training. Only the method and a start that needs no data act here;
`recipe.build_dynamics` and starts that look at data belong to training.
"""

from typing import Any

import visionlora as vl
from tasks.tracking.model.lorat import ADAPTED, LoRAT
from visionlora.compose import Recipe, parse
from visionlora.registry import get_method

METHOD = "lorat"
"""LoRAT's own recipe."""
AUTO = "auto"
"""What the weights hold, and without weights LoRAT's own."""
NORMS = ("blocks.*.norm1", "blocks.*.norm2")
"""Targets of methods that serve norms only."""


def add_adapter(
    model: LoRAT,
    method: str = METHOD,
    *,
    usual_rank: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Recipe:
    """Put an adapter of any method into a tracker's blocks; return its recipe.

    Args:
        model: the tracker; changed in place.
        method: method or product, see `visionlora.compose`.
        usual_rank: the rank, unless the recipe or an option says otherwise.
        seed: of the adapter.
        **options: options of the method.
    """
    recipe = parse(method)
    kind = get_method(recipe.method).config
    said = {**recipe.implied, **recipe.options, **options}
    if usual_rank is not None and "rank" in kind.__dataclass_fields__ and "rank" not in said:
        options["rank"] = usual_rank
    config = recipe.config(**options, seed=seed)
    vl.inject(model, config, NORMS if config.kinds == {"norm"} else ADAPTED)
    start = recipe.init
    on_meta = model.embedding.positions.is_meta
    if start is not None and not start.needs and not on_meta:
        vl.initialise(model, start)
    return recipe
