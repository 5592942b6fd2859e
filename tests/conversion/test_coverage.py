"""timm's classes: some in a second each, and in the slow tier one network of every class, counted by name."""

import pytest

from benchmarks.coverage import AVERAGES, outcome, smallest_of_each_kind, timm_networks, try_timm

FAST = {  # one of each class
    *("test_byobnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_maxvit", "test_nfnet"),
    *("test_resnet", "test_vit_relpos", "ghostnet_050", "mobilenetv3_small_050"),
    "efficientvit_b0",  # its head has a neck
}
# Classes, named as averaging, whose networks do something else.
REFUSED = {
    "VGG": "its head runs pre_logits.fc1 (Conv2d) over the map before it pools",
    "DeepseekVitClassifier": "crop_mode='border' of this classifier's preprocessing is not supported",
    "EfficientViM": "its classifier reads 4 of them",
    "EfficientViMDistilled": "its classifier reads 4 of them",
}
SMALLEST_EXACT = 1040  # of timm's names that average


@pytest.mark.parametrize("name", sorted(FAST))
def test_a_class_is_exact(name):
    found = outcome(try_timm, name)
    assert not found.reason and found.difference <= 1e-5


@pytest.mark.slow
def test_every_class_of_timm_is_exact_or_refused_with_its_reason():
    networks = [network for network in timm_networks() if network.pooling in AVERAGES]
    outcomes = {}
    for network in smallest_of_each_kind(networks):
        outcomes[network.kind] = outcome(try_timm, network.name)
    wrong = {
        kind: found
        for kind, found in outcomes.items()
        if found.reason and not (kind[0] in REFUSED and REFUSED[kind[0]] in found.reason)
    }
    assert not wrong
    assert sum(not outcomes[network.kind].reason for network in networks) >= SMALLEST_EXACT
