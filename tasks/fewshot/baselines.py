"""What frozen features can do without an adapter: baselines on the same shots.

With features f of the shots (of unit length for CLIP), labels y and class-text features W:

| baseline | logits | chosen on validation |
|---|---|---|
| linear probe | V f + b, multinomial logistic regression with an L2 penalty | its strength 1 / C |
| prototype | 16 cos(f, p_c), p_c the mean of the unit features of class c | - |
| Tip-Adapter | 100 W f + alpha sum_i exp(-beta (1 - f f_i)) onehot(y_i) | alpha, beta |

Tip-Adapter (Zhang et al. 2022, arXiv 2207.09519) is the training-free one; its keys f_i are means
over 10 augmented views. Validation images are the data set's own, up to four a class as CoOp draws
them. Without any, C is chosen by cross-validation on the shots, alpha and beta by leaving each shot
out of the cache in turn; with one shot a class there is nothing to choose on and C = 1, alpha = 2
and beta = 1 stay. Equal scores go to the stronger penalty and the smaller alpha and beta. Test
images are never looked at.
"""

import itertools
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tasks.fewshot.classifier import LOGIT_SCALE
from visionlora.errors import ConfigError

Baseline = Literal["linear-probe", "prototype", "tip-adapter"]
WITHOUT_TEXT: tuple[Baseline, ...] = ("linear-probe", "prototype")

PENALTIES = tuple(float(value) for value in np.logspace(-1, 4, 11))
"""Values of C for features that are scaled to a mean norm of 1."""
USUAL_PENALTY = 1.0
FOLDS = 4
ITERATIONS = 500

ALPHAS = tuple(float(value) for value in np.linspace(0.1, 3.0, 20))
BETAS = tuple(float(value) for value in np.linspace(0.1, 7.0, 20))
USUAL_ALPHA, USUAL_BETA = 2.0, 1.0
"""Where Tip-Adapter's own search begins."""


@dataclass(frozen=True)
class Support:
    """Features and labels of the shots, and of validation images if there are any."""

    features: Float[Tensor, "shots in"]
    labels: Int[Tensor, " shots"]
    val_features: Float[Tensor, "images in"] | None = None
    val_labels: Int[Tensor, " images"] | None = None


@dataclass(frozen=True)
class Probe:
    """A fitted linear probe, for features as they are."""

    weight: Float[Tensor, "classes in"]
    bias: Float[Tensor, " classes"]
    penalty: float
    """The chosen C."""

    def __call__(self, features: Float[Tensor, "images in"]) -> Float[Tensor, "images classes"]:
        """Return the logits."""
        return F.linear(features, self.weight, self.bias)


def linear_probe(support: Support) -> Probe:
    """Fit multinomial logistic regression, its penalty chosen on validation images."""
    norm = float(support.features.norm(dim=1).mean().clamp_min(1e-12))
    x, y = _numpy(support.features / norm), support.labels.numpy()
    if support.val_features is not None and support.val_labels is not None:
        goal = [(x, y, _numpy(support.val_features / norm), support.val_labels.numpy())]
    else:
        goal = [(x[train], y[train], x[held], y[held]) for train, held in _folds(support.labels)]
    right = {
        penalty: sum(_fit(tx, ty, penalty).score(hx, hy) * len(hy) for tx, ty, hx, hy in goal)
        for penalty in (PENALTIES if goal else (USUAL_PENALTY,))
    }
    best = max(right, key=lambda penalty: (round(right[penalty]), -penalty))
    model = _fit(x, y, best)
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(weight) == 1:  # two classes share one row, for the second
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return Probe(weight.float() / norm, bias.float(), best)


def prototypes(support: Support) -> Float[Tensor, "classes in"]:
    """Return the mean of the unit features of each class."""
    unit = F.normalize(support.features, dim=-1)
    labels = support.labels
    return torch.stack([unit[labels == k].mean(0) for k in range(int(labels.max()) + 1)])


@dataclass(frozen=True)
class Cache:
    """Tip-Adapter: keys, their labels, text features, and the two numbers."""

    keys: Float[Tensor, "shots in"]
    labels: Int[Tensor, " shots"]
    text: Float[Tensor, "classes in"]
    alpha: float = USUAL_ALPHA
    beta: float = USUAL_BETA

    def __call__(self, features: Float[Tensor, "images in"]) -> Float[Tensor, "images classes"]:
        """Return the logits of unit features."""
        likeness = features @ self.keys.t()
        return LOGIT_SCALE * features @ self.text.t() + self.alpha * self._votes(
            likeness, self.beta
        )

    def _votes(self, likeness: Tensor, beta: float) -> Tensor:
        """Return, per class, how much its keys are like the images."""
        goal = F.one_hot(self.labels, len(self.text)).to(likeness.dtype)
        return torch.exp(-beta * (1 - likeness)) @ goal


def tip_adapter(support: Support, keys: Tensor, text: Tensor) -> Cache:
    """Build the cache, and choose alpha and beta.

    Args:
        support: Unit features of unchanged shots, and of the validation images.
        keys: Unit features of the shots over augmented views, in the same order.
        text: Unit features of the class prompts.
    """
    cache = Cache(keys, support.labels, text)
    if support.val_features is not None and support.val_labels is not None:
        features, labels = support.val_features, support.val_labels
        likeness = features @ keys.t()
    elif int(torch.bincount(support.labels).min()) > 1:
        features, labels = support.features, support.labels
        # A shot does not vote for itself.
        likeness = (features @ keys.t()).fill_diagonal_(-torch.inf)
    else:
        return cache
    zero = LOGIT_SCALE * features @ text.t()
    best, chosen = -1, (USUAL_ALPHA, USUAL_BETA)
    votes = {beta: cache._votes(likeness, beta) for beta in BETAS}
    for alpha, beta in itertools.product(ALPHAS, BETAS):
        right = int(((zero + alpha * votes[beta]).argmax(1) == labels).sum())
        if right > best:
            best, chosen = right, (alpha, beta)
    return Cache(keys, support.labels, text, *chosen)


def _folds(labels: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return folds with every class in every training part, none if a class has one shot."""
    from sklearn.model_selection import StratifiedKFold

    least = int(torch.bincount(labels).min())
    if least < 2:
        return []
    y = labels.numpy()
    return list(StratifiedKFold(min(FOLDS, least)).split(np.zeros(len(y)), y))


def _fit(x: np.ndarray, y: np.ndarray, penalty: float) -> Any:
    """Return scikit-learn's logistic regression, fitted."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ConfigError("a linear probe needs scikit-learn: pip install scikit-learn") from error
    with warnings.catch_warnings():
        # The weakest penalties need not converge; validation judges where they have got to.
        warnings.simplefilter("ignore")
        return LogisticRegression(C=penalty, max_iter=ITERATIONS).fit(x, y)


def _numpy(features: Tensor) -> np.ndarray:
    array: np.ndarray = features.double().numpy()
    return array
