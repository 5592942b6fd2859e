"""`pipeline("image-explanation")`: a photo in, its top classes with a saliency map and an overlay for each out."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline

from .backbone_castream import num_input_channels
from .configuration_castream import POOLINGS
from .decoding_castream import decode_image
from .overlay_castream import Overlay, color_map, to_original
from .preprocessing_castream import Box, image_mode, visible_box
from .saliency_castream import (
    METHODS,
    Target,
    explain_features,
    extract,
    resolve_layer,
    resolve_target,
    upsample_maps,
)

_MOST_REMEMBERED_SIZES = 256


class ImageExplanationPipeline(Pipeline):
    """Explain what an image classifier with a CA-Stream saw in an image.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> explain = pipeline("image-explanation", model="user/model", trust_remote_code=True)
    >>> best = explain("photo.jpg", method="attention_cam")[0]
    >>> best["label"], best["score"]
    >>> best["overlay"].save("explained.png")
    ```
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False
    color_map = staticmethod(color_map)
    methods = METHODS
    decode_image = staticmethod(decode_image)

    def __init__(self, *args, **kwargs):
        self._boxes: dict[tuple[int, int], Box] = {}
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "castream"):
            raise ValueError(
                f"model must be a CAStreamForImageClassification, got {type(self.model).__name__}: convert it first."
            )
        if self.image_processor is None:
            raise ValueError("image_processor is missing: the model's folder has no preprocessor_config.json.")
        # grey or RGBA for networks of one or four channels
        self.image_mode = image_mode(self.image_processor, num_input_channels(self.model.config))

    def __call__(self, inputs, **kwargs):
        """Explain one image, or several.

        Args:
            inputs (whatever `decode_image` takes, or a list, tuple, dataset or generator of it):
                A path, a URL, bytes, a picture or an array. A generator yields its answers as they are ready.
            method (`str` or `list[str]`, defaults to `"grad_cam"`):
                One or more of `explain`'s methods; all share one pass through the backbone.
            pooling (`str` or `list[str]`, *optional*):
                `"ca"`, `"gap"`, both, or None for the model's own.
            layer (`int` or `str`, defaults to -1):
                Where the map is read: an index or a name out of `config.stream_layers`, or `"all"`.
            target (`int`, `str`, or a list, range, array or tensor of them, *optional*):
                Class ids or labels to explain, instead of the most likely ones.
            top_k (`int`, defaults to 5):
                How many of the most likely classes to explain, as in image classification.
            alpha (`float`, defaults to 0.5):
                Opacity of the overlay's colours, 0 to 1.
            timeout (`float`, *optional*):
                Seconds to wait for a URL.

        Returns:
            One list per image of dictionaries, most likely class first (or in the order of `target`):

            - **label** (`str`), **score** (`float`): the class and its probability under `pooling`.
            - **method**, **pooling**, **layer** (`str`): what the map is.
            - **saliency** (`np.ndarray`): (height, width) of the image given, float32 in [0, 1].
            - **box** (`tuple`): left, top, right, bottom of the part that the model saw, in pixels. Processors that
              crop leave out the rest: `saliency` is 0 there and says nothing about it.
            - **overlay** (`PIL.Image`): the map over the image; grey and pale outside of `box`. Its pixels are made
              when they are first asked for.

        Raises:
            ValueError: on an unknown method, pooling, layer or class, an opacity outside [0, 1], or no image.
        """
        if isinstance(inputs, tuple) or getattr(inputs, "ndim", 0) == 4:
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self, method=None, pooling=None, layer=None, target=None, top_k=None, alpha=None, timeout=None
    ):
        forward = {"method": method, "pooling": pooling, "layer": layer, "target": target, "top_k": top_k}
        if method is not None:
            forward["method"] = _several(method, METHODS, "method")
        if pooling is not None:
            forward["pooling"] = _several(pooling, POOLINGS, "pooling")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k must be a number of classes, at least 1, got {top_k!r}.")
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie between 0 (image alone) and 1 (map alone), got {alpha}.")
        given = [{"timeout": timeout}, forward, {"alpha": alpha}]
        return tuple({name: value for name, value in part.items() if value is not None} for part in given)

    def preprocess(self, inputs, timeout: float | None = None) -> dict:
        image = decode_image(inputs, timeout)
        shown = image if self.image_mode == "RGB" else image.convert(self.image_mode)
        pixel_values = self.image_processor(images=shown, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "image": image}

    def _forward(
        self,
        model_inputs: dict,
        method: Sequence[str] = ("grad_cam",),
        pooling: Sequence[str] | None = None,
        layer: int | str = -1,
        target: Target = None,
        top_k: int = 5,
    ) -> dict:
        config, pixel_values = self.model.config, model_inputs["pixel_values"]
        poolings = pooling or [config.pooling]
        layers = range(len(config.stream_layers)) if layer == "all" else [resolve_layer(config, layer)]
        features = extract(self.model, pixel_values)
        targets = self._targets(features.logits(poolings[0]), target, top_k)
        kinds, maps = [], []
        for name in method:
            for index in layers:
                found = explain_features(features, targets, name, poolings, layer=index)
                for one in poolings:
                    kinds.append((name, one, config.stream_layers[index]))
                    maps.append(upsample_maps(found[one], pixel_values.shape[-2:]))
        return {
            "image": model_inputs["image"],
            "kinds": kinds if isinstance(model_inputs["image"], Image.Image) else [kinds] * len(targets),
            "maps": torch.stack(maps, dim=2).float(),  # (batch_size, num_targets, num_kinds, rows, columns)
            "targets": targets,
            "scores": torch.stack([self._scores(features.logits(one), targets) for one in poolings], dim=2),
        }

    def postprocess(self, model_outputs: dict, alpha: float = 0.5) -> list[dict]:
        image, kinds = model_outputs["image"], model_outputs["kinds"]
        box = self.visible_box(image.size)
        targets, scores = model_outputs["targets"][0].tolist(), model_outputs["scores"][0]
        poolings = list(dict.fromkeys(pooling for _, pooling, _ in kinds))
        answers = []
        for target, target_scores, maps in zip(targets, scores, model_outputs["maps"][0], strict=True):
            placed = to_original(maps, box, *image.size).numpy()
            for (method, pooling, layer), saliency in zip(kinds, placed, strict=True):
                answers.append(
                    {
                        "label": self.model.config.id2label.get(target, f"LABEL_{target}"),
                        "score": target_scores[poolings.index(pooling)].item(),
                        "method": method,
                        "pooling": pooling,
                        "layer": layer,
                        "saliency": saliency,
                        "box": tuple(np.clip(box, 0, [image.width, image.height] * 2).tolist()),
                        "overlay": Overlay(image, saliency, box, alpha),
                    }
                )
        return answers

    def visible_box(self, size: tuple[int, int]) -> Box:
        """What the processor shows the model of an image of this (width, height); remembered, as it takes a moment."""
        box = self._boxes.get(size)
        if box is None:
            if len(self._boxes) >= _MOST_REMEMBERED_SIZES:  # another thread may do this at any time
                self._boxes.clear()
            box = self._boxes[size] = visible_box(self.image_processor, *size)
        return box

    def _targets(self, logits: torch.Tensor, target, top_k: int) -> torch.Tensor:
        """Class ids (batch_size, num_targets): the given ones for every image, or each image's most likely."""
        if target is None:
            return logits.topk(min(top_k, logits.shape[-1])).indices
        several = list(target) if np.ndim(target) else [target]
        if not several:
            raise ValueError("target must hold at least one class, got none: leave it out for the most likely ones.")
        ids = [resolve_target(self.model.config, one, 1) for one in several]
        return torch.stack(ids, dim=1).expand(len(logits), -1).to(logits.device)

    def _scores(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Probabilities of the targets; of a regression, whose outputs are no probabilities, the outputs themselves."""
        config = self.model.config
        scores = logits.float() if config.problem_type == "regression" else self.model.probabilities(logits)
        return scores.gather(1, targets)


def _several(values: str | Sequence[str], allowed: Sequence[str], name: str) -> list[str]:
    """One or more names, as a list."""
    values = [values] if isinstance(values, str) else list(values)
    unknown = [value for value in values if value not in allowed]
    if unknown or not values:
        raise ValueError(f"{name} must be one or more of {', '.join(allowed)}, got {unknown or values}.")
    return values


__all__ = ["ImageExplanationPipeline"]
