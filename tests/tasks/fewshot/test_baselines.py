"""Baselines on frozen features: laws, and what they choose on."""

import pytest
import torch
import torch.nn.functional as F

from tasks.fewshot.baselines import (
    ALPHAS,
    BETAS,
    USUAL_ALPHA,
    USUAL_BETA,
    USUAL_PENALTY,
    Cache,
    Support,
    linear_probe,
    prototypes,
    tip_adapter,
)
from tasks.fewshot.classifier import LOGIT_SCALE
from tasks.fewshot.heads import PROTOTYPE_SCALE, prototype_logits


def clusters(count: int, spread: float, seed: int = 0, classes: int = 3) -> Support:
    """Return features around one corner of a simplex per class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(count)
    noise = torch.randn(len(labels), 8, generator=generator)
    return Support(4 * F.one_hot(labels, 8).float() + spread * noise, labels)


def test_a_probe_separates_what_can_be_separated():
    support = clusters(6, 0.3)
    assert (linear_probe(support)(support.features).argmax(1) == support.labels).all()


def test_a_probe_does_not_depend_on_the_length_of_the_features():
    support = clusters(6, 1.5)
    longer = Support(support.features * 1000, support.labels)
    first, second = linear_probe(support), linear_probe(longer)
    assert first.penalty == second.penalty
    torch.testing.assert_close(
        first(support.features), second(longer.features), atol=1e-4, rtol=1e-4
    )


def test_two_classes_have_a_row_each_that_say_the_same():
    support = clusters(6, 1.0, classes=2)
    probe = linear_probe(support)
    assert probe.weight.shape == (2, 8)
    torch.testing.assert_close(probe.weight[0], -probe.weight[1])
    assert (probe(support.features).argmax(1) == support.labels).float().mean() > 0.8


def test_the_penalty_follows_the_validation_images():
    train = clusters(6, 2.0)
    flipped = Support(
        train.features, train.labels, -train.features, train.labels
    )  # all are wrong the better it fits
    same = Support(train.features, train.labels, train.features, train.labels)
    assert linear_probe(flipped).penalty < linear_probe(same).penalty


def test_of_equally_good_penalties_the_strongest_is_taken():
    support = clusters(6, 0.01)
    held = Support(support.features, support.labels, support.features, support.labels)
    assert linear_probe(held).penalty == pytest.approx(0.1)


def test_one_shot_leaves_nothing_to_choose_on():
    support = clusters(1, 0.1)
    assert linear_probe(support).penalty == USUAL_PENALTY
    unit = F.normalize(support.features, dim=-1)
    cache = tip_adapter(Support(unit, support.labels), unit, unit)
    assert (cache.alpha, cache.beta) == (USUAL_ALPHA, USUAL_BETA)


def test_prototypes_are_means_of_unit_features():
    support = Support(torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 3.0]]), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(prototypes(support), torch.tensor([[0.5, 0.5], [0.0, 1.0]]))


def test_the_logits_of_a_prototype_are_scaled_cosines():
    features = torch.tensor([[3.0, 0.0]])
    logits = prototype_logits(features, torch.tensor([[9.0, 0.0], [1.0, 1.0]]))
    torch.testing.assert_close(logits, PROTOTYPE_SCALE * torch.tensor([[1.0, 2**-0.5]]))


def test_a_cache_adds_votes_that_fade_with_distance():
    keys, text = torch.eye(3)[:2], torch.eye(3)[[2, 2]]
    cache = Cache(keys, torch.tensor([0, 1]), text, alpha=2.0, beta=3.0)
    feature = F.normalize(torch.tensor([[1.0, 0.0, 1.0]]), dim=-1)
    near, far = torch.tensor(-3 * (1 - 2**-0.5)).exp(), torch.tensor(-3.0).exp()
    zero = LOGIT_SCALE * 2**-0.5
    torch.testing.assert_close(cache(feature), zero + 2 * torch.stack([near, far])[None])


def test_without_validation_no_shot_votes_for_itself():
    # Every shot is closest to one of the other class, so its own vote is all that could help it.
    keys = F.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]]), dim=-1)
    labels = torch.tensor([0, 1, 0, 1])
    cache = tip_adapter(Support(keys, labels), keys, torch.zeros(2, 2))
    assert (cache.alpha, cache.beta) == (ALPHAS[0], BETAS[0])


def test_alpha_and_beta_are_the_best_of_the_grid_on_validation_images():
    generator = torch.Generator().manual_seed(3)

    def unit(count: int) -> torch.Tensor:
        return F.normalize(torch.randn(count, 6, generator=generator), dim=-1)

    labels, held = torch.arange(4).repeat(3), torch.randint(4, (40,), generator=generator)
    support = Support(unit(12), labels, unit(40), held)
    keys, text = unit(12), unit(4) / 20
    found = tip_adapter(support, keys, text)

    def right(alpha: float, beta: float) -> int:
        cache = Cache(keys, labels, text, alpha, beta)
        return int((cache(support.val_features).argmax(1) == held).sum())

    assert right(found.alpha, found.beta) == max(right(a, b) for a in ALPHAS for b in BETAS)
