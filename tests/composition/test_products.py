"""Which methods, initialisers and dynamics go together, how a product is written, and refusals."""

import itertools

import pytest
import torch

import visionlora as vl
from tests.composition.runs import mean_loss, network, train
from tests.contract.cases import assert_unchanged, snapshot
from visionlora.errors import ConfigError
from visionlora.init.random import Gaussian
from visionlora.registry import (
    get_preset,
    list_dynamics,
    list_initialisers,
)

# -- the table

COLUMNS = ["lora", "rslora", "lora+", "dora", "block-lora", "slora", "lora-xs", "spiel", "full"]
TRAINED_CORE = "trains as well and would spoil the first step"
BASES = "factors are frozen bases"
ENTRIES = "trains entries of the weight, not factors"
WHOLE = "trains the whole matrix, not factors"
CORELESS = "no matrix between its factors"
SOLVED = "two trained factors whose product is the change"
MOVES = "what is frozen has none"

PAIRS = COLUMNS[:5]
NO_PAIR = {"spiel": ENTRIES, "full": WHOLE}
FROZEN = {**NO_PAIR, "lora-xs": BASES}
# What is refused, by column; everything else goes together. The columns `rslora` and `lora+` are
# LoRA with another scale, and with another rate of B.
TABLE = {
    "lora-ga": {**FROZEN, "slora": TRAINED_CORE},
    "lora-one": FROZEN,
    # On Block-LoRA the principal part goes to the sum of the blocks.
    "pissa": FROZEN,
    "olora": FROZEN,
    "corda": FROZEN,
    "eva": NO_PAIR,
    "svd": {**NO_PAIR, **dict.fromkeys(PAIRS, CORELESS)},
    "lora-sb": {**NO_PAIR, **dict.fromkeys(PAIRS, CORELESS), "slora": TRAINED_CORE},
    # On the whole matrix it would be AdamW, which `full` has without it; between frozen bases its
    # closed form is `projected`.
    "lora-pro": {
        "lora+": "another rate for B than for A",
        **dict.fromkeys(["dora", "slora", "lora-xs", "spiel", "full"], SOLVED),
    },
    "projected": dict.fromkeys([*PAIRS, "slora", "spiel", "full"], "two trained ones"),
    "allora": {
        "rslora": "must have s = 1",
        "lora+": "both set the rate of B",
        **dict.fromkeys(["dora", "lora-xs", "spiel", "full"], "rows of a plain product B A"),
    },
    "ggpo": {},
    "sam": {},
    "glad": {},
    "mgpo": {},
    "lisa": {"spiel": MOVES},
    "hft": {"spiel": MOVES},
}
CELLS = [
    (method, factor, refused.get(method)) for factor, refused in TABLE.items() for method in COLUMNS
]


@pytest.mark.parametrize(("method", "factor", "said"), CELLS)
def test_each_cell_of_the_table(method, factor, said):
    if said is None:
        recipe = vl.parse(f"{method}+{factor}")
        assert factor in [*([] if recipe.init is None else [recipe.init.name]), *names(recipe)]
        return
    with pytest.raises(ConfigError, match=said):
        vl.parse(f"{method}+{factor}")


def names(recipe):
    return [item.name for item in recipe.dynamics]


def test_the_table_has_every_dynamics_and_every_initialiser_that_looks_at_something():
    random = {"kaiming", "gaussian", "normal", "orthogonal"}
    like = {"milora": "pissa", "nlora": "svd", "relora": "lora+", "lora+": "a column"}
    assert set(TABLE) | random | set(like) == {*list_initialisers(), *list_dynamics()}


# -- conflicts


@pytest.mark.parametrize(
    ("product", "said"),
    [
        ("lora+lora-pro+lora+", "another rate for B than for A breaks the step"),
        ("lora+allora+lora-pro", "true (gradient|one)"),
        ("lora-fa+lora-pro", "for frozen factors there is 'projected'"),
        ("lora(dropout=0.1)+lora-pro", "needs dropout=0: .* got 0.1"),
        ("lora(alpha=0)+lora-pro", "alpha other than 0: it divides"),
        ("block-lora(layout=grid)+lora-pro", "layout 'grid', whose down-matrix is repeated"),
        ("lora+lora-pro+sam", "takes the gradient at another point"),
        ("lora+lora-pro+glad", "takes the gradient at another point"),
        ("lora+lora-pro+mgpo", "takes the gradient at another point"),
        ("lora(alpha=4)+allora", r"s = 1 .*, got s = 0\.5"),
        ("lora(dropout=0.1)+allora", "set dropout=0, got 0.1"),
        ("lora+allora+lora+", "both set the rate of B against that of A"),
        ("lora+sam+glad", "both move the parameters for a second look"),
        ("lora+sam+mgpo", "both move the parameters for a second look"),
        ("lora+glad+mgpo", "both move the parameters for a second look"),
        ("full+lisa+hft", "both decide what is frozen"),
        ("lora(dropout=0.1)+relora", "needs dropout=0: it would act on what was put aside"),
        ("lora(dropout=0.1)+lora-ga", "dropout 0.1 on the branch would scatter"),
        ("lora(dropout=0.1)+lora-one", "dropout 0.1 on the branch would scatter"),
        ("block-lora(layout=grid)+lora-ga", "layout 'grid': its down-matrix repeats"),
        ("lora(alpha=-1)+pissa", "pissa needs a positive alpha, got -1"),
        ("adalora+allora", "allora cannot train adalora: its gains"),
        ("lora+pissa+olora", "two initialisers, (pissa and olora|olora and pissa)"),
    ],
)
def test_a_conflict_is_refused_in_any_order_and_says_why(product, said):
    method, *factors = split(product)
    for order in itertools.permutations(factors):
        with pytest.raises(ConfigError, match=said) as caught:
            vl.parse("+".join([method, *order]))
        assert "\n" not in str(caught.value)


def split(product):
    """Split a product of which no name but the last ends with a plus."""
    plus = product.endswith("+")
    parts = product.removesuffix("+").split("+")
    return [*parts[:-1], f"{parts[-1]}+"] if plus else parts


def test_options_that_a_factor_needs_are_set_unless_the_user_says_otherwise():
    assert vl.parse("lora+allora").config().scale == 1.0
    assert vl.parse("lora+allora").config(rank=4).scale == 1.0
    with pytest.raises(ConfigError, match="must have s = 1"):
        vl.parse("lora+allora").config(alpha=3.0)
    with pytest.raises(ConfigError, match="set dropout=0"):
        vl.parse("lora-ga").config(dropout=0.5)


# -- how a product is written


@pytest.mark.parametrize(
    "factors",
    [["lora-ga", "glad", "lora+"], ["glad(rho=0.1)", "lisa(every=3)", "eva"], ["relora", "ggpo"]],
)
def test_the_order_of_factors_does_not_matter(factors):
    found = [vl.parse("+".join(["lora", *order])) for order in itertools.permutations(factors)]
    for other in found[1:]:
        assert other.config() == found[0].config()
        assert other.init == found[0].init
        assert set(other.dynamics) == set(found[0].dynamics)


@pytest.mark.parametrize(
    "product",
    ["lora+lisa+lora+", "lora+hft+lora-pro", "dora+lisa+relora", "lora-fa+projected+ggpo"],
)
def test_a_run_is_the_same_in_any_order(product, tmp_path):
    """What freezes a part when it is built does not hide it from the others."""
    first, second = vl.parse(product).dynamics
    method = product.partition("+")[0]
    orders = [f"{method}+{one.name}+{two.name}" for one, two in ((first, second), (second, first))]
    runs = [train(case, tmp_path / case) for case in orders]
    assert torch.equal(runs[0].outputs(), runs[1].outputs())


@pytest.mark.parametrize("method", ["increlora", "diffora", "squeeze-lora"])
@pytest.mark.parametrize("mask", ["lisa", "hft"])
def test_parameters_that_come_and_go_are_not_frozen(method, mask):
    with pytest.raises(ConfigError, match=f"{mask} cannot train {method}: it replaces, adds or"):
        vl.parse(f"{method}+{mask}")


def test_options_follow_their_name():
    recipe = vl.parse("block-lora(rank=4, blocks=2) + lora-ga(gamma=16) + glad(rho=0.1, every=2)")
    assert (recipe.config().rank, recipe.config().blocks) == (4, 2)
    assert recipe.init.gamma == 16
    (glad,) = recipe.dynamics
    assert (glad.rho, glad.every, glad.weight) == (0.1, 2, 0.5)
    assert recipe.config(rank=6, blocks=3).rank == 6
    words = vl.parse("slora+nlora(intermediate=pinv, residual=true)+relora(warmup=None)")
    assert (words.init.intermediate, words.init.residual) == ("pinv", True)
    assert words.dynamics[0].warmup is None


def test_options_of_a_preset_go_to_its_factor_or_its_method():
    recipe = vl.parse("lora-ga(gamma=16, rank=4)+glad")
    assert (recipe.init.gamma, recipe.config().rank) == (16, 4)
    assert recipe.factors[1:] == vl.parse("lora(rank=4)+lora-ga(gamma=16)+glad").factors[1:]
    assert vl.parse("rslora(rank=4)").config().scaling == "rslora"
    assert vl.parse("lora-sb+projected").method == get_preset("lora-sb").method == "lora-xs"


@pytest.mark.parametrize(
    ("text", "ratio", "others"),
    [
        ("lora+", 16.0, []),
        ("lora+lora+", 16.0, []),
        ("lora+(ratio=4)", 4.0, []),
        ("lora++glad", 16.0, ["glad"]),
        ("lora+lora+(ratio=4)+glad", 4.0, ["glad"]),
        ("lora+glad+lora+", 16.0, ["glad"]),
        ("dora + lora+ + glad", 16.0, ["glad"]),
        ("dora+lora+(ratio=1e+1)", 10.0, []),
    ],
)
def test_lora_plus_keeps_its_plus(text, ratio, others):
    recipe = vl.parse(text)
    found = {item.name: item for item in recipe.dynamics}
    assert found.pop("lora+").ratio == ratio
    assert list(found) == others
    assert recipe.method == ("dora" if text.startswith("dora") else "lora")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lroa+glad", "unknown method 'lroa' .*'lora'"),
        ("lora+gald", r"'gald' is neither an initialiser nor a dynamics \(did you mean 'glad'"),
        ("lora+lora-gaa", "did you mean 'lora-ga'"),
        ("lora+glad(roh=1)", r"glad has no option 'roh' \(did you mean 'rho'\?\)"),
        ("lora-ga(gama=1)", "has no option 'gama'"),
        ("lora(rnk=1)+glad", "lora has no option 'rnk' .*'rank'"),
        ("lora+glad(rho=-1)", "rho must not be negative, got -1"),
        ("lora+glad(rho=big)", "rho must be a finite number, got 'big'"),
        ("lora+glad(every=0)", "every must be at least 1"),
        ("lora+glad(0.1)", "must read key=value"),
        ("lora+glad(**{})", "must read key=value"),
        ("lora+glad(rho=0.1, rho=0.2)", "must read key=value"),
        ("lora+glad(rho=print())", "must read key=value"),
        ("lora+glad(rho=1)+(1)", "must read key=value"),
        ("lora+glad(rho=1)(every=2)", "must read key=value"),
        ("lora+glad(rho=0.1", r"'glad\(rho=0.1' is not a name with options"),
        ("lora+dora", "has two methods; dora must stand alone or come first"),
        ("lora+block-lora+glad", "has two methods; block-lora"),
        ("dora+rslora", "has two methods; rslora"),
        ("lora+pissa+pissa", "two initialisers, pissa and pissa"),
        ("lora+glad+glad", "glad is there twice"),
        ("glad+glad", "glad is there twice"),
        ("lora++lora+", r"lora\+ is there twice"),
        ("pissa+olora", "two initialisers, pissa and olora"),
        ("projected", "must begin with a method, and projected is none: write lora-fa-pro"),
        ("svd", r"must begin with a method, and svd is none: write lora-xs\+svd"),
        ("lora(offset=2)", "offset is set by initialisers and restarts"),
        ("+lora", "a name is missing beside a plus sign"),
        ("lora+++glad", "a name is missing beside a plus sign"),
        ("", "a method is a name, or a product"),
        ("  ", "a method is a name, or a product"),
        (None, "a method is a name, or a product"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        vl.parse(text)
    assert "\n" not in str(caught.value)


# -- before any compute


class Untouchable:
    """Batches that must not be asked for."""

    def __iter__(self):
        raise AssertionError("data were looked at")


@pytest.mark.parametrize("product", ["lora-xs+pissa", "spiel+olora", "lora(alpha=-1)+pissa", "svd"])
def test_a_refused_start_leaves_the_model_alone(product):
    model = network()
    before = snapshot(model)
    with pytest.raises(ConfigError):
        vl.inject(model, product, "type:Linear", rank=2)
    assert_unchanged(model, before)


def test_a_dynamics_is_no_part_of_a_model():
    model = network()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="glad is a training dynamics, not part of the model"):
        vl.inject(model, "lora+glad", "type:Linear")
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["lora-ga", "lora-sb", "corda", "pissa"])
def test_a_refused_initialiser_looks_at_no_data(name):
    model = vl.inject(network(), "lora-fa", "type:Linear", rank=2)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="down-matrix is drawn from the seed and never trains"):
        vl.initialise(model, name, Untouchable(), mean_loss)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora+", "both must train"),
        ("lora-pro", "cannot train lora-fa"),
        ("allora", "plain product"),
    ],
)
def test_dynamics_refuse_a_model_with_an_adapter_that_they_cannot_train(name, said):
    """`parse` knows the method by its name; the model may hold another."""
    model = vl.inject(network(), "lora-fa", "type:Linear", rank=2)
    optimizer = torch.optim.AdamW(vl.parameter_groups(model, lr=0.01, weight_decay=0.0))
    before, groups = snapshot(model), [len(group["params"]) for group in optimizer.param_groups]
    with pytest.raises(ConfigError, match=said):
        vl.parse(name).build_dynamics(model, optimizer, 8)
    assert_unchanged(model, before)
    assert [len(group["params"]) for group in optimizer.param_groups] == groups


class NoneAtTheHead(Gaussian):
    """Draws A, but for one layer."""

    def start(self, given):
        if given.where.startswith("head"):
            raise ConfigError("no start for the head")
        return super().start(given)


def test_starts_are_known_everywhere_before_one_is_set():
    model = vl.inject(network(), "lora", "type:Linear", rank=2)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="no start for the head"):
        vl.initialise(model, NoneAtTheHead())
    assert_unchanged(model, before)
    vl.initialise(model, Gaussian())
    with pytest.raises(AssertionError):
        assert_unchanged(model, before)
