"""Masked views: what hides, what shows instead, and that both belong to the sample alone."""

import pytest
import torch
from castream.data.masks import draw_backgrounds, draw_masks, make_backgrounds, scale_to_unit, show_masked

KINDS = ["soft", "salient", "complement", "blob", "blob"]


def test_masks_belong_to_their_sample():
    saliency = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([7, 8, 2**55])
    together = draw_masks(seeds, saliency, KINDS, (20, 30))
    assert together.shape == (3, 5, 20, 30) and together.min() >= 0 and together.max() <= 1
    for item in range(3):
        alone = draw_masks(seeds[item : item + 1], saliency[item : item + 1], KINDS, (20, 30))
        torch.testing.assert_close(alone[0], together[item])
        chosen = draw_backgrounds(seeds[item : item + 1], 5, ["black", "grey", "blur"])
        assert torch.equal(chosen[0], draw_backgrounds(seeds, 5, ["black", "grey", "blur"])[item])


def test_each_kind_hides_what_it_says():
    saliency = torch.tensor([[[0.0, 1.0], [0.5, 0.25]]])
    salient, complement = draw_masks(torch.tensor([1]), saliency, ["salient", "complement"], (2, 2))[0]
    torch.testing.assert_close(salient, saliency[0])
    torch.testing.assert_close(complement, 1 - saliency[0])
    blobs = draw_masks(torch.arange(50), saliency.expand(50, -1, -1), ["blob"], (16, 16))[:, 0]
    assert set(blobs.unique().tolist()) == {0.0, 1.0}
    shown = blobs.mean((1, 2))
    assert 0.08 < shown.min() < 0.25 and 0.7 < shown.max() < 0.87  # a tenth to 85 % of the image
    soft = draw_masks(torch.arange(5), saliency.expand(5, -1, -1), ["soft"], (16, 16))
    assert len(soft.unique()) > 100


def test_backgrounds_are_normalised_like_the_image():
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    made = make_backgrounds((pixels - mean) / std, ["black", "grey", "blur"], mean, std)
    black, grey, blur = ((one * std + mean).expand_as(pixels) for one in made)
    torch.testing.assert_close(black, torch.zeros_like(pixels), atol=1e-6, rtol=0)
    torch.testing.assert_close(grey, torch.full_like(pixels, 0.5))
    torch.testing.assert_close(blur.mean((2, 3)), pixels.mean((2, 3)), atol=0.01, rtol=0)
    assert blur.std() < 0.2 * pixels.std()


def test_a_flat_map_scales_to_zero():
    assert scale_to_unit(torch.full((1, 3, 3), 4.0)).abs().max() == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_a_masked_view_is_the_image_where_it_is_shown_and_its_background_elsewhere(channels):
    generator = torch.Generator().manual_seed(0)
    pixels, one, two = torch.randn(3, 4, channels, 5, 6, generator=generator).unbind()
    two = two[:1]  # one for all images
    masks, chosen = torch.rand(4, 5, 6, generator=generator), torch.tensor([1, 0, 0, 1])
    for layout in (torch.contiguous_format, torch.channels_last):
        shown = show_masked(pixels.contiguous(memory_format=layout), masks, [one, two], chosen)
        for item, kind in enumerate(chosen.tolist()):
            expected = masks[item] * pixels[item] + (1 - masks[item]) * (one, two.expand_as(one))[kind][item]
            torch.testing.assert_close(shown[item], expected)
    assert shown.is_contiguous(memory_format=torch.channels_last)
