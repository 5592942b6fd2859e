"""What the page computes: the classes of a photo, maps for one of them, and what is left of its probability."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

SHOWN_METHODS = ["attention_cam", "grad_cam", "grad_cam_plus_plus"]
EVIDENCE_METHODS = {"evidence": "memory", "object": "constant"}  # method -> the evidence block that it shows
POOLINGS = {"gap": "GAP", "source": "the source", "ca": "CA"}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FORMATS += tuple({"AVIF", "HEIF"} & set(Image.registered_extensions().values()))  # phones', where Pillow can
MOST_PIXELS = 40_000_000
LARGEST_SIDE = 512
MOST_ELONGATED = 20


class NoPhoto(ValueError):
    """What was given is not a picture that this page explains. The message is for the visitor."""


@dataclass(frozen=True)
class Map:
    """One saliency map of the photo.

    Args:
        title: method, or depth.
        pooling: `"gap"`, `"source"` or `"ca"`.
        saliency: (height, width) of the photo, uint8, 255 being 1.
        before: probability of the class for the photo, in [0, 1]; None for maps that are no class's.
        after: the same for the photo multiplied by the map.
    """

    title: str
    pooling: str
    saliency: np.ndarray
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True)
class Explanation:
    """Everything the page shows about one photo and class.

    Args:
        photo: RGB.
        label: the class.
        box: left, top, right, bottom of the part that the model saw, in pixels of the photo.
        maps: those of the evidence blocks, the same under either pooling; then one per method and pooling.
        attention: raw attention, one map per depth, shallow to deep.
        attention_title: what raw attention is of.
    """

    photo: Image.Image
    label: str
    box: tuple[float, float, float, float]
    maps: list[Map]
    attention: list[Map]
    attention_title: str


def open_photo(path: str, decode: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Read an uploaded file as an RGB picture, upright and small enough to explain quickly.

    Args:
        decode: the pipeline's `decode_image`.

    Raises:
        NoPhoto: where the file is no image, a broken one, or one of extreme size or shape.
    """
    limit = f"Please give one of at most {MOST_PIXELS // 1_000_000} megapixels."
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise NoPhoto(f"This image has {width} x {height} pixels. {limit}")
            if max(width, height) > MOST_ELONGATED * min(width, height):
                raise NoPhoto(f"This image is {width} x {height} pixels, too thin to be explained.")
            image.draft("RGB", (2 * LARGEST_SIDE, 2 * LARGEST_SIDE))
            photo = decode(image)
    except NoPhoto:
        raise
    except Image.DecompressionBombError:
        raise NoPhoto(f"This image has far too many pixels. {limit}") from None
    except UnidentifiedImageError:
        raise NoPhoto("This file is not an image that can be read. Please give a JPEG, PNG or WebP picture.") from None
    except Exception as error:  # decoders raise whatever they meet in a broken file
        reason = error if isinstance(error, ValueError) else "its header cannot be read."
        raise NoPhoto(f"This image is damaged, or of a kind that is not understood: {reason}") from None
    photo.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return photo


class Explainer:
    """The model behind the page. It keeps nothing of a photo, so that any number of visitors may share it.

    Args:
        pipe: an image-explanation pipeline.
    """

    def __init__(self, pipe):
        self.pipe = pipe
        self.colors = pipe.color_map()
        own = getattr(pipe.model.config, "source_pooling", "gap")  # a published model's code may be an earlier one
        self.poolings, averages = [own, "ca"], own == "gap"
        self.own_readout = "global average pooling (GAP)" if averages else "its own readout (the source)"
        self.shown_methods = [name for name in SHOWN_METHODS if averages or not pipe.methods[name].needs_positions]
        self.depths = list(pipe.model.config.stream_layers)
        agnostic = pipe.model.config.query == "class_agnostic"
        self.attention_title = "Raw attention, the same for every class" if agnostic else "Raw attention"
        blocks = pipe.model.config.evidence_queries or []
        self.evidence_methods = [method for method, block in EVIDENCE_METHODS.items() if block in blocks]
        blank = Image.new("RGB", (LARGEST_SIDE, LARGEST_SIDE))
        self.explain(blank, self.classes(blank, top_k=1)[0][0])  # the first pass is slow: not a visitor's

    def classes(self, photo: Image.Image, top_k: int = 5) -> list[tuple[int, str, float]]:
        """The most likely classes: id, label, probability under the model's own pooling."""
        pooling = self.pipe.model.config.pooling
        probabilities = self._probabilities([photo], [pooling])[pooling][0]
        scores, ids = probabilities.topk(min(top_k, len(probabilities)))
        labels = self.pipe.model.config.id2label
        return [
            (index, labels.get(index, f"LABEL_{index}"), score)
            for index, score in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    def explain(self, photo: Image.Image, class_id: int) -> Explanation:
        """All maps for one class, which its label need not name alone."""
        answers = self.pipe(photo, method=self.shown_methods, pooling=self.poolings, target=class_id)
        if self.evidence_methods:
            own = self.pipe.model.config.pooling
            answers = self.pipe(photo, method=self.evidence_methods, pooling=own, target=class_id) + answers
        attention = self.pipe(photo, method="raw_attention", layer="all", pooling="ca", target=class_id)
        after = self._probabilities_of_masked(photo, answers, class_id)
        maps = [
            Map(
                self.pipe.methods[answer["method"]].title,
                answer["pooling"],
                _to_bytes(answer["saliency"]),
                answer["score"],
                left,
            )
            for answer, left in zip(answers, after, strict=True)
        ]
        depths = [Map(answer["layer"], "ca", _to_bytes(answer["saliency"])) for answer in attention]
        return Explanation(photo, answers[0]["label"], answers[0]["box"], maps, depths, self.attention_title)

    def _probabilities_of_masked(self, photo: Image.Image, answers: list[dict], class_id: int) -> list[float]:
        """The class's probability for photo x map, each under its map's own pooling."""
        pixels = np.asarray(photo, dtype=np.float32)
        masked = [
            Image.fromarray((pixels * answer["saliency"][..., None]).round().astype(np.uint8)) for answer in answers
        ]
        found = self._probabilities(masked, self.poolings)
        return [found[answer["pooling"]][index, class_id].item() for index, answer in enumerate(answers)]

    def _probabilities(self, pictures: list[Image.Image], poolings: list[str]) -> dict[str, torch.Tensor]:
        """Pooling -> (num_pictures, num_labels), of one pass through the backbone."""
        model, castream = self.pipe.model, self.pipe.model.castream
        pixel_values = self.pipe.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        folding = getattr(castream, "folding", nullcontext)  # an earlier version's code has none
        with torch.no_grad(), folding():
            feature_maps, cls_token = castream.extract_features(pixel_values.to(model.device, model.dtype))
            pooled = {pooling: castream.pool_features(feature_maps, pooling)[0] for pooling in poolings}
            logits = {pooling: model.classify(one, cls_token).float() for pooling, one in pooled.items()}
        return {pooling: model.probabilities(values) for pooling, values in logits.items()}


def _to_bytes(saliency: np.ndarray) -> np.ndarray:
    return (saliency * 255).round().astype(np.uint8)
