"""Saliency against an object's mask: hand-computed values, the flat map, and bad input."""

import pytest
import torch
from castream.evaluation.localization import box_mask, mask_share, pixel_precision, pointing_hit, sparsity
from castream.evaluation.masking import pixel_order

# 2x3 maps: a peak in the top right, two equal peaks, all zero, constant
MAPS = torch.tensor(
    [
        [[0.0, 0.1, 0.6], [0.1, 0.1, 0.1]],
        [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]],
    ]
)
LEFT = torch.tensor([[True, False, False], [True, False, False]]).expand(4, -1, -1)
RIGHT = LEFT.flip(2)


def test_mask_share_by_hand():
    torch.testing.assert_close(mask_share(MAPS, LEFT), torch.tensor([0.1, 0.5, 0, 1 / 3], dtype=torch.float64))
    torch.testing.assert_close(mask_share(MAPS, RIGHT), torch.tensor([0.7, 0.5, 0, 1 / 3], dtype=torch.float64))


def test_mask_share_ignores_scale_and_adds_up():
    torch.manual_seed(0)
    saliency, mask = torch.rand(5, 7, 9), torch.rand(5, 7, 9) > 0.5
    torch.testing.assert_close(mask_share(saliency * 1e-3, mask), mask_share(saliency, mask), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        mask_share(saliency, mask) + mask_share(saliency, ~mask), torch.ones(5, dtype=torch.float64)
    )


def test_pointing_hit_by_hand():
    """The second map's last peak counts; the flat maps are misses wherever the object is."""
    assert pointing_hit(MAPS, LEFT).tolist() == [False, False, False, False]
    assert pointing_hit(MAPS, RIGHT).tolist() == [True, True, False, False]
    everywhere = torch.ones_like(LEFT)
    assert pointing_hit(MAPS, everywhere).tolist() == [True, True, False, False]


def test_pointing_hit_follows_the_pixel_order():
    """Of equal maxima the one that insertion would take first."""
    first = pixel_order(MAPS[1:2])[0, 0]
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, first] = True
    assert pointing_hit(MAPS[1:2], mask.view(1, 2, 3)).tolist() == [True]


def test_pointing_tolerance_is_a_euclidean_distance():
    saliency, mask = torch.zeros(1, 9, 9), torch.zeros(1, 9, 9, dtype=torch.bool)
    saliency[0, 4, 4], mask[0, 7, 8] = 1, True  # 3 rows and 4 columns away: distance 5
    assert [pointing_hit(saliency, mask, tolerance).item() for tolerance in (0, 4.99, 5)] == [False, False, True]


def test_pixel_precision_by_hand():
    """Of the first map, 0.1 is one of 5 pixels at least as salient and 0.0 one of 6; 0.6 is alone. Flat: a third."""
    left, right = pixel_precision(MAPS, LEFT), pixel_precision(MAPS, RIGHT)
    assert left.tolist() == pytest.approx([(1 / 5 + 2 / 6) / 2, (1 / 2 + 2 / 6) / 2, 1 / 3, 1 / 3], abs=1e-12)
    assert right.tolist() == pytest.approx([(1 + 2 / 5) / 2, (1 / 2 + 2 / 6) / 2, 1 / 3, 1 / 3], abs=1e-12)


def test_pixel_precision_by_its_definition():
    """In plain loops, with ties; a map that is the mask has 1."""
    torch.manual_seed(0)
    saliency, mask = torch.randint(0, 6, (3, 5, 7)) / 5, torch.rand(3, 5, 7) > 0.6
    for found, values, inside in zip(pixel_precision(saliency, mask), saliency, mask, strict=True):
        precisions = []
        for value in values[inside].tolist():
            chosen = values >= value
            precisions.append((chosen & inside).sum().item() / chosen.sum().item())
        assert found.item() == pytest.approx(sum(precisions) / len(precisions), abs=1e-12)
    assert pixel_precision(mask.float(), mask).tolist() == [1, 1, 1]


def test_pixel_precision_knows_the_order_only():
    torch.manual_seed(0)
    saliency, mask = torch.rand(4, 9, 8), torch.rand(4, 9, 8) > 0.5
    assert torch.equal(pixel_precision(saliency**8, mask), pixel_precision(saliency, mask))
    assert torch.equal(pixel_precision(saliency / 100, mask), pixel_precision(saliency, mask))


def test_sparsity_by_hand():
    torch.testing.assert_close(sparsity(MAPS), torch.tensor([3.6, 3, 1, 1], dtype=torch.float64))
    assert sparsity(torch.full((1, 331, 317), 0.1)).item() == pytest.approx(1, abs=1e-9)
    assert (sparsity(torch.full((1, 331, 317), 0.1)) >= 1).all()


def test_box_mask_by_hand():
    """Columns 1 and 2 of rows 0 and 1; a border through a pixel's centre at 2.5 leaves that pixel out; both at once."""
    first, second = [1.0, 0.0, 3.0, 2.0], [0.4, 0.4, 2.5, 1.2]
    assert box_mask([first], (3, 4)).astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert box_mask([second], (3, 4)).astype(int).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert box_mask([first, second], (3, 4)).astype(int).tolist() == [[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_batch_equals_singles():
    torch.manual_seed(0)
    saliency, mask = torch.rand(4, 5, 8), torch.rand(4, 5, 8) > 0.6
    saliency[1] = 0
    for function in (mask_share, pointing_hit, pixel_precision):
        singles = torch.cat([function(saliency[i : i + 1], mask[i : i + 1]) for i in range(4)])
        assert torch.equal(function(saliency, mask), singles)
    assert torch.equal(sparsity(saliency), torch.cat([sparsity(item[None]) for item in saliency]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_share(MAPS, LEFT[:, :1]), r"mask has shape \(4, 1, 3\) and dtype torch.bool"),
        (lambda: mask_share(MAPS, LEFT.float()), "dtype torch.float32 but saliency"),
        (lambda: mask_share(-MAPS, LEFT), "saliency holds negative"),
        (lambda: pointing_hit(MAPS * torch.nan, LEFT), "saliency holds negative, NaN"),
        (lambda: pointing_hit(MAPS[0], LEFT[0]), r"saliency has shape \(2, 3\)"),
        (lambda: pointing_hit(MAPS, LEFT, tolerance=-1), "tolerance=-1"),
        (lambda: mask_share(MAPS, LEFT & (torch.arange(4) != 2).view(4, 1, 1)), "mask of item 2 has no pixel"),
        (lambda: sparsity(MAPS / 0), "saliency holds negative, NaN or infinite"),
        (lambda: box_mask([0, 0, 2, 2], (3, 3)), r"boxes has shape \(4,\)"),
        (lambda: box_mask([[5, 5, 2, 9]], (9, 9)), r"boxes holds \[\[5.0, 5.0, 2.0, 9.0\]\]: give x0 < x1"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
