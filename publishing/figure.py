"""The card's picture: one photo, its explanation under GAP and under CA, and what the colours mean."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modeling_castream.overlay_castream import color_map

METHODS = ("grad_cam", "attention_cam")
_SIDE, _GAP, _HEADER, _BAR = 280, 12, 52, 12
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def draw_example(model, image_processor, example) -> Image.Image:
    """Explain a photo's most likely class by `METHODS` under its own pooling and CA, side by side, with a legend.

    Args:
        example: path, URL or picture.
    """
    explain = model.explainer(image_processor)
    photo, answers = _shrink(example), []
    config = model.config
    methods = METHODS if config.source_pooling == "gap" else METHODS[:1]  # Attention-CAM needs pooled positions
    answers = explain(photo, method=list(methods), pooling=[config.source_pooling, "ca"], top_k=1)
    panels = [("image", answers[0]["label"], photo)]
    for answer in answers:
        title = f"{answer['method']}, {answer['pooling'].upper()}"
        panels.append((title, f"{answer['score']:.1%}", answer["overlay"]))
    return _arrange(panels)


def _shrink(example) -> Image.Image:
    from transformers.image_utils import load_image

    photo = load_image(str(example) if not isinstance(example, Image.Image) else example)
    photo.thumbnail((2 * _SIDE, 2 * _SIDE))
    return photo


def _arrange(panels: list[tuple[str, str, Image.Image]]) -> Image.Image:
    """Panels in a row under two lines of text each, and the colour bar below."""
    scale = _SIDE / panels[0][2].width
    height = round(panels[0][2].height * scale)
    width = len(panels) * (_SIDE + _GAP) + _GAP
    canvas = Image.new("RGB", (width, _HEADER + height + 3 * _GAP + _BAR + 24), _PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(17)
    for index, (title, subtitle, picture) in enumerate(panels):
        left = _GAP + index * (_SIDE + _GAP)
        for row, text in enumerate((title, subtitle)):
            draw.text((left, 6 + 22 * row), _fit(text, font), fill=_INK, font=font)
        canvas.paste(picture.resize((_SIDE, height), Image.Resampling.LANCZOS), (left, _HEADER))
    top = _HEADER + height + _GAP
    bar = Image.fromarray(color_map()[None].repeat(_BAR, 0)).resize((2 * _SIDE, _BAR))
    canvas.paste(bar, (_GAP, top))
    draw.text((_GAP, top + _BAR + 4), "0: least", fill=_INK, font=font)
    draw.text((_GAP + 2 * _SIDE, top + _BAR + 4), "1: most, of each map's own range", fill=_INK, font=font, anchor="ra")
    draw.text(
        (3 * _GAP + 2 * _SIDE, top),
        "Pale grey: cut off by the image processor, the model did not see it.",
        fill=_INK,
        font=font,
    )
    return canvas


def _fit(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Shorten a text to a panel's width."""
    if font.getlength(text) <= _SIDE:
        return text
    lengths = np.array([font.getlength(text[:count] + "…") for count in range(len(text))])
    return text[: int(np.searchsorted(lengths, _SIDE)) - 1] + "…"
