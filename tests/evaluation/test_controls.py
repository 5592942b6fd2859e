import math

import pytest
import torch
from castream.evaluation.controls import (
    confidences,
    control_maps,
    fit_temperature,
    map_area,
    match_area,
    match_norm,
    pool_by_mask,
    rank_correlation,
    shuffled_classifier,
)

from tests.evaluation.small import small_model


def test_random_maps_belong_to_their_image_and_seed():
    together = control_maps("random_map", [3, 8], (7, 7), seed=1)
    alone = control_maps("random_map", [8], (7, 7), seed=1)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(alone, control_maps("random_map", [8], (7, 7), seed=2))
    assert together.min() >= 0 and together.max() <= 1


def test_center_gaussian_is_highest_in_the_middle_and_symmetric():
    saliency = control_maps("center_gaussian", [0], (7, 5), seed=0)[0]
    assert saliency[3, 2] == saliency.max() == 1
    torch.testing.assert_close(saliency, saliency.flip(0))
    torch.testing.assert_close(saliency, saliency.flip(1))
    # one cell off the centre is 1/7 of the height: exp(-(1/7)^2 / (2 * 0.25^2))
    assert saliency[2, 2].item() == pytest.approx(math.exp(-((1 / 7) ** 2) / 0.125))


def test_area_is_the_mean_of_the_upsampled_map():
    saliency = torch.tensor([[[0.0, 1.0]], [[0.5, 0.5]]])
    # width 4: 0, 0.25, 0.75, 1 by bilinear interpolation between cell centres
    torch.testing.assert_close(map_area(saliency, (1, 4)), torch.tensor([0.5, 0.5]))


def test_matched_maps_have_the_asked_area_and_the_same_order():
    generator = torch.Generator().manual_seed(0)
    saliency = torch.rand(6, 7, 5, generator=generator)
    area = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
    matched = match_area(saliency, area, (224, 160))
    torch.testing.assert_close(map_area(matched, (224, 160)), area, atol=1e-4, rtol=0)
    assert torch.equal(matched.flatten(1).argsort(1), saliency.flatten(1).argsort(1))


def test_matching_by_hand():
    """The one power that gives 1/4 of (1/2, 1/2, ...) is 2."""
    saliency = torch.full((1, 4, 4), 0.5)
    torch.testing.assert_close(match_area(saliency, torch.tensor([0.25]), (8, 8)), torch.full((1, 4, 4), 0.25))


def test_a_map_of_zeros_and_ones_keeps_its_area():
    saliency = torch.zeros(2, 2, 2)
    saliency[1] = 1
    matched = match_area(saliency, torch.tensor([0.3, 0.3]), (4, 4))
    torch.testing.assert_close(matched, saliency)


def test_the_area_of_an_empty_map_makes_maps_empty():
    """No power would: the largest value of a map is one."""
    matched = match_area(torch.rand(2, 4, 4), torch.tensor([0.0, 0.3]), (8, 8))
    assert not matched[0].any() and matched[1].any()


def test_the_bound_pools_what_the_mask_shows_at_the_norm_of_the_mean():
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(3, 4, 2, 3, generator=generator, dtype=torch.double)
    mask = torch.rand(3, 6, 6, generator=generator, dtype=torch.double)
    mask[2] = 0
    pooled = pool_by_mask(feature_map, mask)
    for item in range(2):
        shown, mean = [0.0] * 4, [0.0] * 4
        for row in range(2):
            for column in range(3):
                weight = sum(mask[item, 3 * row + i, 2 * column + j].item() for i in range(3) for j in range(2)) / 6
                for channel in range(4):
                    shown[channel] += weight * feature_map[item, channel, row, column].item()
                    mean[channel] += feature_map[item, channel, row, column].item() / 6
        scale = (sum(value**2 for value in mean) / sum(value**2 for value in shown)) ** 0.5
        assert pooled[item].tolist() == pytest.approx([scale * value for value in shown], rel=1e-9)
    torch.testing.assert_close(pooled[2], feature_map[2].mean((1, 2)))


def test_norm_matching_keeps_the_direction():
    vector, reference = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])
    torch.testing.assert_close(match_norm(vector, reference), torch.tensor([[6.0, 8.0]]))
    torch.testing.assert_close(match_norm(vector[:, None], reference), torch.tensor([[[6.0, 8.0]]]))
    assert match_norm(torch.zeros(1, 2), reference).tolist() == [[0, 0]]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_temperature_is_found_again(temperature):
    logits = 3 * torch.randn(50, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def confidence(value):
        return (logits / value).softmax(-1).amax(1).mean().item()

    assert fit_temperature(confidence, confidence(temperature)) == pytest.approx(temperature, rel=1e-6)


def test_confidence_of_a_multi_label_model_falls_with_the_temperature():
    """Its largest probability rises with it, here from under a half to a half: nothing could be fitted to that."""
    logits = torch.tensor([[-3.0, -4.0, -6.0], [-2.0, -5.0, 1.0]])
    one, two = (confidences((logits / temperature).sigmoid(), independent=True) for temperature in (1.0, 2.0))
    assert (two < one).all()
    assert one[0].item() == pytest.approx(1 - sum(1 / (1 + math.exp(x)) for x in (3, 4, 6)) / 3)
    assert confidences(logits.softmax(-1), independent=False)[1].item() == pytest.approx(
        math.e / (math.e + math.exp(-2) + math.exp(-5))
    )


def test_a_confidence_out_of_reach_is_refused():
    with pytest.raises(
        ValueError, match=r"no temperature from 1/100 to 100 gives GAP the mean confidence of CA, 0\.0500"
    ):
        fit_temperature(lambda temperature: max(0.1, 1 / (1 + temperature)), 0.05)


def test_shuffling_touches_only_the_twins_classifier():
    model = small_model()
    weight = model.classifier.weight.detach().clone()
    twin = shuffled_classifier(model, seed=0)
    assert torch.equal(model.classifier.weight, weight)
    assert not torch.equal(twin.classifier.weight, weight)
    assert torch.equal(twin.classifier.weight.flatten().sort().values, weight.flatten().sort().values)
    assert twin.castream is model.castream
    assert torch.equal(twin.classifier.weight, shuffled_classifier(model, seed=0).classifier.weight)


def test_rank_correlation_by_hand():
    # ranks 1, 2, 3.5, 3.5 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5
    first = torch.tensor([[[0.0, 0.1], [0.7, 0.7]]])
    second = torch.tensor([[[0.0, 0.2], [0.3, 0.9]]])
    assert rank_correlation(first, second)[0] == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation(first, -first)[0] == pytest.approx(-1)
    assert math.isnan(rank_correlation(first, torch.zeros(1, 2, 2))[0])
