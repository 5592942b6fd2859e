import pytest
import torch
from castream.evaluation.masking import (
    blur_images,
    deletion_end,
    inner_points,
    insertion_start,
    pixel_order,
    saliency_order,
)


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_reference_is_the_papers():
    images, saliency = noise(2, 3, 32, 32), noise(2, 32, 32).round(decimals=1)
    start = insertion_start(images, "reference")
    assert torch.equal(start, blur_images(images))
    assert torch.equal(deletion_end(images, start, "reference"), torch.zeros_like(images))
    assert torch.equal(saliency_order(saliency, "reference"), pixel_order(saliency))


def test_stable_blur_is_stronger_and_leaves_a_flat_image_as_it_is():
    flat = torch.full((1, 3, 64, 48), 0.7)
    torch.testing.assert_close(insertion_start(flat, "stable"), flat)
    assert (insertion_start(flat, "reference")[..., 0, 0] < 0.5).all()  # borders fade to the mean colour
    images = noise(1, 3, 64, 48)
    assert insertion_start(images, "stable").std() < 0.5 * insertion_start(images, "reference").std()


def test_stable_blur_works_on_a_strip():
    assert insertion_start(noise(1, 3, 4, 64), "stable").shape == (1, 3, 4, 64)


def test_stable_deletion_ends_where_insertion_starts():
    images = noise(1, 3, 32, 32)
    start = insertion_start(images, "stable")
    assert deletion_end(images, start, "stable") is start


def test_stable_order_differs_in_ties_only():
    distinct = torch.randperm(64, generator=torch.Generator().manual_seed(1)).view(1, 8, 8) / 64
    assert torch.equal(saliency_order(distinct, "stable"), pixel_order(distinct))
    two_levels = torch.zeros(2, 8, 8)
    two_levels[:, :4] = 1
    order = saliency_order(two_levels, "stable")
    assert torch.equal(order[0], order[1])  # every image alike, in every run
    assert sorted(order[0, :32].tolist()) == list(range(32))
    assert order[0, :32].tolist() != pixel_order(two_levels)[0, :32].tolist()
    # half of any prefix of a flat region lies in each half of the image, more or less
    assert 8 < (order[0, 32:48] % 8 < 4).sum() + 4 < 20


@pytest.mark.parametrize("protocol", ["hiding_blur", "blurred_deletion", "random_ties"])
def test_a_change_alone_is_stables_and_leaves_the_rest_to_the_reference(protocol):
    images, saliency = noise(2, 3, 32, 32), noise(2, 32, 32).round(decimals=1)

    def parts(name):
        start = insertion_start(images, name)
        return {
            "hiding_blur": start,
            "blurred_deletion": deletion_end(images, start, name),
            "random_ties": saliency_order(saliency, name),
        }

    alone, reference, stable = parts(protocol), parts("reference"), parts("stable")
    for name, part in alone.items():
        assert torch.equal(part, (stable if name == protocol else reference)[name])
    assert not torch.equal(alone[protocol], reference[protocol])


def test_inner_points_leave_out_both_ends():
    start, end = torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)
    order = torch.arange(256)[None]
    points = torch.cat(list(inner_points(start, end, order, points_per_chunk=2)))
    assert points.flatten(1).sum(1).tolist() == [128]  # 8 x 16 pixels a step, two steps
