"""Every loss is its paper's formula, by values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from raftdiff.losses import clipped_ratio, gold, kl_estimate, masked_mean, preference, weighted_error


def test_weighted_error_is_weight_times_error_with_gradients_to_the_error_alone():
    error_B = torch.tensor([2.0, 0.5, 3.0], requires_grad=True)
    loss_B, metrics = weighted_error(error_B, torch.tensor([1.0, 4.0, -1.0]))
    assert loss_B.tolist() == [2.0, 2.0, -3.0]
    loss_B.sum().backward()
    assert error_B.grad is not None and error_B.grad.tolist() == [1.0, 4.0, -1.0]
    assert metrics["error"].tolist() == [2.0, 0.5, 3.0] and not metrics["error"].requires_grad


def test_gold_weighs_each_token_by_its_likelihood_of_which_no_gradient_is_taken():
    log_prob_BT = torch.tensor([[0.5, 0.05], [0.25, 1.0]]).log().requires_grad_()  # the second text has one token
    loss_B, metrics = gold(log_prob_BT, torch.tensor([2.0, 0.5]), least=0.1)
    expected = [-2 * (0.5 * math.log(0.5) + 0.1 * math.log(0.05)), -0.5 * 0.25 * math.log(0.25)]
    torch.testing.assert_close(loss_B, torch.tensor(expected))
    loss_B.sum().backward()
    assert log_prob_BT.grad is not None
    torch.testing.assert_close(log_prob_BT.grad[0], torch.tensor([-1.0, -0.2]))
    torch.testing.assert_close(metrics["error"], torch.tensor([-math.log(0.5 * 0.05), -math.log(0.25)]))


# -- preferences -------------------------------------------------------------------------------------------------------


def errors(*values: float) -> tuple[torch.Tensor, ...]:
    """Each as a batch of one, in double precision, with gradients."""
    return tuple(torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values)


# beta ((.7 - .5) - (.8 - .9)) = 2 (.2 + .1) = .6; log(1 + exp(-.6)) = .437488, log(1 + exp(.6)) = 1.037488
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.437488),
        ({"kind": "cdpo", "label_smoothing": 0.1}, 0.9 * 0.437488 + 0.1 * 1.037488),
        ({"kind": "sigmoid", "label_smoothing": 0.1}, 0.437488),  # the smoothing is cdpo's
        ({"kind": "ipo"}, 0.01),  # (.6 - 1/2)^2
    ],
)
def test_each_preference_loss_is_its_formula(settings: dict, expected: float):
    loss_B, metrics = preference(*errors(0.5, 0.9, 0.7, 0.8), beta=2.0, **settings)
    assert loss_B.item() == pytest.approx(expected, abs=1e-6)
    assert {name: value_B.item() for name, value_B in metrics.items()} == pytest.approx(
        {
            "accuracy": 1.0,
            "margin": 0.6,
            "chosen_reward": 0.4,
            "rejected_reward": -0.2,
            "chosen_error": 0.5,
            "rejected_error": 0.9,
        }
    )
    assert not any(value_B.requires_grad for value_B in metrics.values())


def test_the_gradient_of_dpo_is_beta_times_how_wrong_the_margin_is():
    chosen_B, rejected_B, *reference = errors(0.5, 0.9, 0.7, 0.8)
    preference(chosen_B, rejected_B, *reference, beta=2.0)[0].sum().backward()
    assert chosen_B.grad is not None and rejected_B.grad is not None
    assert chosen_B.grad.item() == pytest.approx(2 * 0.354344, abs=1e-6)  # beta sigmoid(-.6)
    assert rejected_B.grad.item() == pytest.approx(-2 * 0.354344, abs=1e-6)


@pytest.mark.parametrize(("kind", "start"), [("sigmoid", math.log(2)), ("cdpo", math.log(2)), ("ipo", 0.25)])
def test_where_policy_and_reference_agree_there_is_no_margin_and_the_accuracy_is_a_half(kind, start: float):
    loss_B, metrics = preference(*errors(0.5, 0.9, 0.5, 0.9), beta=2500.0, kind=kind, label_smoothing=0.3)
    assert loss_B.item() == pytest.approx(start, abs=1e-12)
    assert metrics["margin"].item() == 0.0 and metrics["accuracy"].item() == 0.5


def test_ipo_stops_at_its_margin_and_cdpo_at_its_label_noise_where_dpo_goes_on():
    def slope(h: float, **settings) -> float:
        chosen_B, *others = errors(1.0 - h, 1.0, 1.0, 1.0)
        preference(chosen_B, *others, beta=4.0, **settings)[0].sum().backward()
        assert chosen_B.grad is not None
        return chosen_B.grad.item()

    assert slope(1 / 8, kind="ipo") == pytest.approx(0.0, abs=1e-12)  # h = 1 / (2 beta)
    assert slope(1 / 16, kind="ipo") > 0 > slope(1 / 4, kind="ipo")
    sure = math.log(0.9 / 0.1) / 4.0  # sigmoid(beta h) = 1 - .1
    assert slope(sure, kind="cdpo", label_smoothing=0.1) == pytest.approx(0.0, abs=1e-12)
    assert slope(1 / 4) > 0.0 and slope(sure) > 0.0


def test_a_preference_that_is_fully_learnt_or_fully_wrong_stays_finite():
    chosen_B, rejected_B, *reference = errors(0.0, 1.0, 1.0, 0.0)
    right, _ = preference(chosen_B, rejected_B, *reference, beta=1e4)
    wrong, _ = preference(rejected_B, chosen_B, *reference[::-1], beta=1e4)
    assert right.item() == 0.0 and wrong.item() == pytest.approx(2e4)


# -- policy gradients --------------------------------------------------------------------------------------------------


def test_the_clipped_ratio_takes_the_worse_of_both_and_stops_outside_the_range():
    ratio_B, advantage_B = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0]), torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0])
    log_prob_B = (ratio_B.log() - 1.0).requires_grad_()
    old_BT, mask_BT = torch.full((5, 1), -1.0), torch.ones(5, 1, dtype=torch.bool)
    loss_B, metrics = clipped_ratio(log_prob_B[:, None], old_BT, advantage_B[:, None], mask_BT, clip=0.2)
    assert loss_B.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, -2.0])
    assert metrics["ratio"].tolist() == pytest.approx([1.5, 1.5, 0.5, 0.5, 1.0])
    assert metrics["clipped"].tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    loss_B.sum().backward()
    assert log_prob_B.grad is not None
    assert log_prob_B.grad.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0, -2.0])  # -ratio * advantage where not cut


def test_the_clipped_ratio_of_a_text_is_the_mean_over_its_own_tokens():
    """Of two tokens with one advantage, and of one token beside which there is nothing."""
    ratio_BT = torch.tensor([[1.5, 0.5], [1.1, 7.0]])
    log_prob_BT = ratio_BT.log().requires_grad_()
    mask_BT = torch.tensor([[True, True], [True, False]])
    zeros_BT, advantage_BT = torch.zeros(2, 2), torch.tensor([[2.0], [-3.0]])
    loss_B, metrics = clipped_ratio(log_prob_BT, zeros_BT, advantage_BT, mask_BT, clip=0.2)
    assert loss_B.tolist() == pytest.approx([-(1.2 * 2 + 0.5 * 2) / 2, 1.1 * 3])
    assert metrics["ratio"].tolist() == pytest.approx([1.0, 1.1])
    assert metrics["ratio_change"].tolist() == pytest.approx([0.5, 0.1])
    assert metrics["clipped"].tolist() == [1.0, 0.0]
    loss_B.sum().backward()
    assert log_prob_BT.grad is not None
    assert log_prob_BT.grad.flatten().tolist() == pytest.approx([0.0, -0.5, 3.3, 0.0])  # the half of -ratio * 2


def test_the_masked_mean_is_over_what_a_row_has_and_0_where_it_has_nothing():
    value_BT = torch.tensor([[1.0, 3.0, 8.0], [5.0, 8.0, 8.0], [8.0, 8.0, 8.0]])
    mask_BT = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert masked_mean(value_BT, mask_BT).tolist() == [2.0, 5.0, 0.0]


def test_the_kl_estimate_is_schulmans_and_never_negative():
    log_prob_B = torch.tensor([0.0, 0.0, 0.0])
    estimate_B = kl_estimate(log_prob_B, torch.tensor([math.log(2), -math.log(2), 0.0]))
    assert estimate_B.tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5, 0.0], abs=1e-6)


def test_the_mean_of_the_kl_estimate_over_the_policys_samples_is_the_kl():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    kl = 0.5 * math.log(2.5) + 0.3 * math.log(0.6) + 0.2 * math.log(2 / 3)
    assert (p * kl_estimate(p.log(), q.log())).sum().item() == pytest.approx(kl, abs=1e-6)
