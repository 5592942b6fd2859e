"""The paper's headline table, ImageNet validation, to stand beside ours.

Source: CA-Stream, arXiv:2404.14996, table of interpretability metrics and accuracy.
"""

import re

COLUMNS = ("average_drop", "average_gain", "average_increase", "insertion", "deletion")
# ImageNet-1k under its usual names, as a Hub id or a path; not -v2, -sketch, -a, tiny- and their like
IMAGENET = re.compile(r"(^|[/\\ ])(imagenet([-_]?(1k|2012)[\w-]*)?|ilsvrc[-_]?2012)([/\\ ,*]|$)")

# network -> (accuracy by pooling, {(method, pooling): AD, AG, AI, I, D}), all in percent
PUBLISHED = {
    "ResNet-50": (
        {"gap": 74.55, "ca": 74.70},
        {
            ("grad_cam", "gap"): (13.04, 17.56, 44.47, 72.57, 13.24),
            ("grad_cam", "ca"): (12.54, 22.67, 48.56, 75.53, 13.50),
            ("grad_cam_plus_plus", "gap"): (13.79, 15.87, 42.08, 72.32, 13.33),
            ("grad_cam_plus_plus", "ca"): (13.99, 19.29, 44.60, 75.21, 13.78),
            ("score_cam", "gap"): (8.83, 17.97, 48.46, 71.99, 14.31),
            ("score_cam", "ca"): (7.09, 23.65, 54.20, 74.91, 14.68),
        },
    ),
    "ConvNeXt-B": (
        {"gap": 83.72, "ca": 83.51},
        {
            ("grad_cam", "gap"): (33.72, 2.43, 15.25, 52.85, 29.57),
            ("grad_cam", "ca"): (19.45, 13.96, 32.89, 86.38, 45.29),
            ("grad_cam_plus_plus", "gap"): (34.01, 2.37, 15.60, 52.83, 29.17),
            ("grad_cam_plus_plus", "ca"): (36.69, 8.00, 21.95, 85.39, 53.42),
            ("score_cam", "gap"): (43.55, 2.23, 15.67, 50.96, 39.49),
            ("score_cam", "ca"): (23.51, 11.04, 27.35, 83.41, 60.53),
        },
    ),
}


def network_name(config) -> str | None:
    """The paper's name of a CAStreamConfig's backbone, or None where the paper has no such network."""
    backbone = config.backbone_config
    depths, widths = list(getattr(backbone, "depths", [])), list(getattr(backbone, "hidden_sizes", []))
    if backbone.model_type == "resnet" and backbone.layer_type == "bottleneck":
        return "ResNet-50" if (depths, widths) == ([3, 4, 6, 3], [256, 512, 1024, 2048]) else None
    if backbone.model_type == "convnext":
        return "ConvNeXt-B" if (depths, widths) == ([3, 3, 27, 3], [128, 256, 512, 1024]) else None
    if backbone.model_type in ("timm_backbone", "timm_wrapper"):
        timm_name = backbone.backbone if backbone.model_type == "timm_backbone" else backbone.architecture
        return {"resnet50": "ResNet-50", "convnext_base": "ConvNeXt-B"}.get(timm_name.split(".")[0])
    return None


def published_rows(config, dataset: str) -> tuple[str, dict, dict] | None:
    """Network, accuracies and rows that the paper gives for this network on this dataset, None where it gives none.

    Args:
        config: a CAStreamConfig.
        dataset: name and split, of which the paper has ImageNet-1k's validation.
    """
    name = network_name(config)
    dataset = dataset.lower()
    if name is None or config.num_labels != 1000 or "val" not in dataset or not IMAGENET.search(dataset):
        return None
    return name, *PUBLISHED[name]
