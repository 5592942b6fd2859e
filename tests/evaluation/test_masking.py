"""Masked, blurred and perturbed images: hand-computed values, the research code's, invariants and bad input."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from castream.evaluation.masking import (
    blur_images,
    blur_profile,
    inner_points,
    mask_images,
    normalize_images,
    num_steps,
    perturbation_counts,
    perturbation_images,
    pixel_order,
    pixels_per_step,
    transition_images,
    upsample_saliency,
)

from tests.evaluation.small import curve_images
from tests.reference import formula

REFERENCE = np.load(Path(__file__).resolve().parents[1] / "reference" / "metrics_public.npz")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def random_images(batch_size=2, height=16, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch_size, 3, height, width, generator=generator), torch.rand(
        batch_size, height, width, generator=generator
    )


@pytest.fixture(scope="module")
def public():
    images, pixel_values = formula.images("metrics_public")
    return (
        torch.from_numpy(images),
        torch.from_numpy(pixel_values),
        torch.from_numpy(formula.saliency("metrics_public")),
    )


# --- against the research code's figures


def test_reference_blur(public):
    profile = blur_profile()
    assert profile.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(torch.outer(profile, profile).numpy(), REFERENCE["blur.kernel"], atol=1e-8, rtol=0)
    np.testing.assert_allclose(blur_images(public[1])[:1].numpy(), REFERENCE["blur.images"], atol=1e-6, rtol=0)


def test_reference_upsampling():
    maps = torch.from_numpy(REFERENCE["stream.gradcam.map"])
    upsampled = upsample_saliency(maps, (64, 64))
    np.testing.assert_allclose(upsampled[:1].numpy(), REFERENCE["stream.gradcam.upsampled"], atol=1e-7, rtol=0)


def test_reference_order(public):
    order = pixel_order(public[2])
    np.testing.assert_array_equal(order[:1].numpy(), REFERENCE["synthetic.order"])


def test_reference_order_of_a_flat_map():
    """The research code's Grad-CAM of the second image is all zero: its order runs from the last pixel to the first."""
    assert not REFERENCE["gap.gradcam.map"][1].any()
    order = pixel_order(torch.zeros(1, 64, 64))
    np.testing.assert_array_equal(order[0].numpy(), REFERENCE["gap.gradcam.order"][1])


def test_reference_masking(public):
    """The formula of the recipe, recomputed in numpy."""
    images, _, saliency = public
    expected = (images.numpy() * saliency.numpy()[:, None] - formula.MEAN) / formula.STD
    np.testing.assert_allclose(mask_images(images, saliency, MEAN, STD).numpy(), expected, atol=1e-6, rtol=0)


def test_reference_number_of_points(public):
    images, pixel_values, saliency = public
    assert (pixels_per_step(64, 64), num_steps(64, 64)) == (512, 8)
    assert (
        len(curve_images("insertion", pixel_values, pixel_order(saliency)))
        == REFERENCE["gap.synthetic.insertion.curve"].shape[1]
    )
    assert (
        len(list(perturbation_images(images, pixel_order(saliency), MEAN, STD)))
        == REFERENCE["gap.synthetic.perturbation.positive.logits"].shape[1]
    )


# --- by hand


def test_blur_profile_by_hand():
    """Three cells, sigma .5: the Gaussian reaches two cells, and what leaves the three is mirrored back in."""
    near, far = np.exp(-0.5 / 0.25), np.exp(-2 / 0.25)
    total = 1 + 2 * near + 2 * far
    # from the middle, two steps out land on the mirrored border cell
    np.testing.assert_allclose(blur_profile(3, 0.5).numpy(), np.array([near + far, 1, near + far]) / total, atol=1e-15)


def test_blur_by_hand():
    """A constant image fades to the mean colour at a zero-padded border, and stays constant at a mirrored one."""
    image = torch.ones(1, 1, 9, 9, dtype=torch.float64)
    zeros, mirrored = blur_images(image)[0, 0], blur_images(image, padding="reflect")[0, 0]
    edge = blur_profile()[:3].sum()
    assert (
        zeros[4, 4] == pytest.approx(1) and zeros[0, 4] == pytest.approx(edge) and zeros[0, 0] == pytest.approx(edge**2)
    )
    torch.testing.assert_close(mirrored, torch.ones_like(mirrored))


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_blur_in_plain_loops(padding):
    image = torch.rand(2, 1, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    profile = blur_profile(5, 2.0).tolist()

    def pixel(one, row, column):
        if padding == "reflect":  # 0 1 2 3 4 -> .. 2 1 | 0 1 2 3 4 | 3 2 ..
            row, column = (4 - abs(4 - abs(row)), 6 - abs(6 - abs(column)))
        inside = 0 <= row < 5 and 0 <= column < 7
        return float(image[one, 0, row, column]) if inside else 0.0

    wanted = torch.zeros_like(image)
    for one, row, column in itertools.product(range(2), range(5), range(7)):
        for down, across in itertools.product(range(5), repeat=2):
            value = pixel(one, row + down - 2, column + across - 2)
            wanted[one, 0, row, column] += profile[down] * profile[across] * value
    torch.testing.assert_close(blur_images(image, 5, 2.0, padding), wanted, atol=1e-12, rtol=0)


def test_pixel_order_by_hand():
    saliency = torch.tensor([[[0.1, 0.9], [0.5, 0.5]], [[0.0, 0.0], [0.0, 0.0]]])
    assert pixel_order(saliency).tolist() == [[1, 3, 2, 0], [3, 2, 1, 0]]


def test_mask_images_by_hand():
    images, saliency = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[1.0, 0.0]]])
    assert mask_images(images, saliency, [0.25], [0.5]).flatten().tolist() == [0.5, -0.5]


def test_steps_by_hand():
    assert (pixels_per_step(224, 224), num_steps(224, 224)) == (1792, 28)
    # 20 rows are two and a half steps of 8 rows: three steps, the last a smaller one; the same for the transposed image
    assert (pixels_per_step(20, 40), num_steps(20, 40)) == (320, 3)
    assert (pixels_per_step(40, 20), num_steps(40, 20)) == (320, 3)


def test_transition_by_hand():
    start, end = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    chunks = list(transition_images(start, end, torch.tensor([[2, 0, 3, 1]]), [0, 1, 2, 4]))
    assert [chunk.flatten().tolist() for chunk in chunks] == [[0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1]]


def test_insertion_and_deletion_ends():
    images, saliency = random_images(height=20, width=40)
    order = pixel_order(saliency)
    inserted, deleted = (curve_images(metric, images, order) for metric in ("insertion", "deletion"))
    assert inserted.shape == (num_steps(20, 40) + 1, *images.shape) == deleted.shape
    assert torch.equal(inserted[0], blur_images(images)) and torch.equal(inserted[-1], images)
    assert torch.equal(deleted[0], images) and not deleted[-1].any()


def test_insertion_and_deletion_change_the_most_salient_pixels():
    images, saliency = random_images(height=20, width=40)
    threshold = saliency.flatten(1).sort(descending=True).values[:, 320 - 1]  # 320 pixels a step, no ties
    salient = (saliency >= threshold[:, None, None])[:, None]
    inserted, deleted = (curve_images(metric, images, pixel_order(saliency))[1] for metric in ("insertion", "deletion"))
    torch.testing.assert_close(inserted, torch.where(salient, images, blur_images(images)), atol=0, rtol=0)
    torch.testing.assert_close(deleted, images * ~salient, atol=0, rtol=0)


def test_perturbation_counts_are_the_reference_ones():
    """Exact integers; the reference truncates a product of floats, which agrees at usual sizes."""
    for size in (64, 100, 224, 240, 256, 260, 299, 300, 384, 448, 512):
        assert perturbation_counts(size, size) == [int(size * size * share) for share in np.arange(0.1, 1, 0.1)]


@pytest.mark.parametrize("positive", [True, False])
def test_perturbation_blackens_the_right_pixels(positive):
    images, saliency = random_images(height=10, width=30)
    images = images.clamp(min=0.01)  # so that no pixel is black beforehand
    made = torch.cat(list(perturbation_images(images, pixel_order(saliency), MEAN, STD, positive=positive)))
    black = -torch.tensor(MEAN).view(3, 1, 1) / torch.tensor(STD).view(3, 1, 1)
    removed = (made == black).all(dim=2)
    assert removed.sum(dim=(2, 3)).tolist() == [[30 * share] * 2 for share in range(1, 10)]
    for chosen in removed:
        for item, mask in zip(saliency, chosen, strict=True):
            gone, kept = item[mask], item[~mask]
            assert gone.min() > kept.max() if positive else gone.max() < kept.min()
    kept_pixels = ~removed[:, :, None].expand_as(made)
    assert torch.equal(made[kept_pixels], normalize_images(images, MEAN, STD).expand_as(made)[kept_pixels])


# --- invariants


def test_upsampling_keeps_a_map_of_that_size_and_does_not_rescale():
    maps = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    assert torch.equal(upsample_saliency(maps, (2, 2)), maps)
    # 2 -> 3: the middle lies half way (align_corners=False), so its value is the mean of the four
    assert upsample_saliency(maps, (3, 3))[0, 1, 1] == pytest.approx(0.25)
    assert upsample_saliency(maps * 0.5, (7, 9)).max() <= 0.5


@pytest.mark.parametrize("metric", ["insertion", "deletion"])
def test_batch_equals_singles_and_chunks_change_nothing(metric):
    images, saliency = random_images(3, 20, 40)
    order = pixel_order(saliency)
    together = curve_images(metric, images, order)
    singles = [curve_images(metric, images[i : i + 1], order[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(singles, dim=1), atol=1e-6, rtol=0)
    chunks = list(transition_images(images, 0 * images, order, [0, 320, 640, 800], points_per_chunk=3))
    assert [len(chunk) for chunk in chunks] == [3, 1]
    assert torch.equal(curve_images(metric, images, order, points_per_chunk=3), together)
    backwards = torch.cat(list(transition_images(images, 0 * images, order, [640, 0])))
    assert torch.equal(backwards, torch.cat(chunks)[[2, 0]])


def test_perturbation_chunks_change_nothing():
    images, saliency = random_images()
    order = pixel_order(saliency)
    one = torch.cat(list(perturbation_images(images, order, MEAN, STD)))
    assert torch.equal(torch.cat(list(perturbation_images(images, order, MEAN, STD, points_per_chunk=4))), one)


def test_images_are_made_lazily():
    """Asking for a 4000-point path costs nothing until its images are taken."""
    images, saliency = random_images(8, 64, 64)
    path = transition_images(images, images, pixel_order(saliency), range(4000))
    assert next(path).shape == (1, *images.shape)


def test_inputs_are_left_alone_and_dtype_is_kept():
    images, saliency = random_images()
    before = images.clone(), saliency.clone()
    order = pixel_order(saliency)
    for chunk in inner_points(images, 0 * images, order, 1):
        chunk.zero_()
    for chunk in perturbation_images(images, order, MEAN, STD):
        chunk.zero_()
    mask_images(images, saliency, MEAN, STD).zero_()
    assert torch.equal(images, before[0]) and torch.equal(saliency, before[1])
    assert mask_images(images.bfloat16(), saliency, MEAN, STD).dtype == torch.bfloat16
    assert curve_images("insertion", images.double(), order).dtype == torch.float64


def test_autocast_does_not_touch_the_images():
    images, saliency = random_images()
    order = pixel_order(saliency)
    outside = curve_images("insertion", images, order)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(curve_images("insertion", images, order), outside)
        assert upsample_saliency(saliency, (31, 17)).dtype == torch.float32


# --- bad input, one line each


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s: mask_images(x, s[:, :4], MEAN, STD), r"saliency has shape \(2, 4, 24\) but images"),
        (lambda x, s: mask_images(x, s[:1], MEAN, STD), r"saliency has shape \(1, 16, 24\) but images"),
        (lambda x, s: mask_images(x, s * torch.nan, MEAN, STD), "saliency holds NaN"),
        (lambda x, s: mask_images(x, s, [0.5], [0.5]), "mean and std have 1 and 1 entries but images has 3 channels"),
        (lambda x, s: mask_images((x * 255).byte(), s, MEAN, STD), "dtype torch.uint8: give a floating point"),
        (lambda x, s: pixel_order(s[0]), r"saliency has shape \(16, 24\)"),
        (lambda x, s: pixel_order(s / 0), "saliency holds NaN or infinite"),
        (lambda x, s: upsample_saliency(s[:, None], (8, 8)), r"saliency has shape \(2, 1, 16, 24\)"),
        (lambda x, s: inner_points(x, x, pixel_order(s)[:, :9], 1), r"order has shape \(2, 9\) but 2 images of 16x24"),
        (lambda x, s: inner_points(x, x, pixel_order(s) * 0, 1), "order is not a permutation"),
        (lambda x, s: inner_points(x, x, pixel_order(s) + 1, 1), "order is not a permutation"),
        (lambda x, s: inner_points(x, x, pixel_order(s), points_per_chunk=0), "points_per_chunk=0"),
        (lambda x, s: transition_images(x, x[:1], pixel_order(s), [0]), "start has shape"),
        (lambda x, s: blur_images(x, kernel_size=4), "kernel_size=4, sigma=5.0: give an odd"),
        (lambda x, s: blur_images(x, sigma=0), "kernel_size=5, sigma=0: give an odd"),
        (lambda x, s: blur_images(x, padding="circular"), "padding='circular': choose"),
        (lambda x, s: blur_images(x[0]), r"images has shape \(3, 16, 24\)"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    """Errors come at the call, before the first image is asked for."""
    with pytest.raises(ValueError, match=message) as error:
        call(*random_images())
    assert "\n" not in str(error.value)
