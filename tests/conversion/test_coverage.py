"""timm's classes: ten in a second each, and in the slow tier one network of every class, counted by name."""

import pytest

from benchmarks.coverage import AVERAGES, outcome, smallest_of_each_kind, timm_networks, try_timm

TEN = {  # one of each class
    *("test_byobnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_maxvit", "test_nfnet"),
    *("test_resnet", "test_vit_relpos", "ghostnet_050", "mobilenetv3_small_050"),
}
# Classes, named as averaging, whose networks do something else.
REFUSED = {
    "CPUBone": "on every position first",
    "EfficientVit": "on every position first",
    "EfficientVitLarge": "on every position first",
    "LowFormer": "on every position first",
    "VGG": "on every position first",
    "EfficientViM": "its classifier reads 4 of them",
    "EfficientViMDistilled": "its classifier reads 4 of them",
}
SMALLEST_EXACT = 1040  # of timm's names that average


@pytest.mark.parametrize("name", sorted(TEN))
def test_a_class_is_exact(name):
    is_exact, what = outcome(try_timm, name)
    assert is_exact, what


@pytest.mark.slow
def test_every_class_of_timm_is_exact_or_refused_with_its_reason():
    networks = [network for network in timm_networks() if network.pooling in AVERAGES]
    outcomes = {}
    for network in smallest_of_each_kind(networks):
        outcomes[network.kind] = outcome(try_timm, network.name)
    wrong = {
        kind: what
        for kind, (is_exact, what) in outcomes.items()
        if not is_exact and REFUSED.get(kind[0], " ") not in what
    }
    assert not wrong
    assert sum(outcomes[network.kind][0] for network in networks) >= SMALLEST_EXACT
