import pytest
import torch
from castream.training.objective import Mixer


@pytest.fixture
def batch():
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8) * 60
    return {"images": images.contiguous(), "labels": torch.tensor([0, 1, 2, 1]), "keys": list("abcd")}


def mixer(mixup=0.0, cutmix=0.0, rank=0):
    return Mixer(mixup, cutmix, 3, seed=0, rank=rank)


def test_nothing_is_mixed_unasked(batch):
    assert mixer()(batch, 0, 0) is batch


def test_mixup_mixes_pixels_and_labels_alike(batch):
    mixed = mixer(mixup=1.0)(batch, 5, 0)
    assert mixed["images"].dtype == torch.uint8 and torch.allclose(mixed["labels"].sum(1), torch.ones(4))
    shares = torch.nn.functional.one_hot(batch["labels"], 3).float()
    partners = shares.roll(1, 0)
    weight = mixed["labels"][0, 0]  # image 0 and its partner, image 3, have different labels
    assert torch.allclose(weight * shares + (1 - weight) * partners, mixed["labels"])
    values = batch["images"][:, 0, 0, 0].float()
    expected = weight * values + (1 - weight) * values.roll(1)
    assert (mixed["images"][:, 0, 0, 0].float() - expected).abs().max() <= 1


def test_cutmix_pastes_a_box_and_its_share_of_the_label(batch):
    mixed = mixer(cutmix=1.0)(batch, 1, 0)
    pasted = (mixed["images"][1, 0] == batch["images"][0, 0]).float().mean()
    assert mixed["labels"][1, 0].item() == pytest.approx(pasted.item(), abs=1e-6)


def test_mixing_repeats_by_step_and_differs_by_process_and_step(batch):
    first = mixer(mixup=0.5)(batch, 3, 0)
    torch.rand(7)
    assert torch.equal(first["labels"], mixer(mixup=0.5)(batch, 3, 0)["labels"])
    others = [mixer(mixup=0.5)(batch, 4, 0), mixer(mixup=0.5)(batch, 3, 1), mixer(rank=1, mixup=0.5)(batch, 3, 0)]
    assert all(not torch.equal(first["labels"], other["labels"]) for other in others)
