"""How an explanation looks: HTML for the page, and one picture for keeping.

A map is a coloured image laid over the photo. Its opacity is a CSS variable, so that the page's slider needs no server.
"""

import base64
import html
import io

import numpy as np
from explanation import POOLINGS, Explanation, Map
from PIL import Image, ImageDraw, ImageFont

HOW_TO_READ = (
    "How to read this: bright places are those that this method counts most for the class, relative to the same map's "
    "least; the two numbers are the class's probability for the whole image and for the image darkened where the map "
    "is dark. A map shows where the network's evidence lies, not why, and proves nothing about the rest."
)
_INK, _PAPER, _CELL, _MARGIN = (20, 20, 20), (255, 255, 255), 320, 12


def colorize(saliency: np.ndarray, colors: np.ndarray, box: tuple[float, float, float, float]) -> Image.Image:
    """The map's colours, transparent outside of the box."""
    return Image.fromarray(np.dstack([colors[saliency], 255 * inside(saliency.shape, box).astype(np.uint8)]))


def inside(shape: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """Which pixels' centres lie in the part that the model saw: boolean (height, width)."""
    x, y = np.arange(shape[1]) + 0.5, np.arange(shape[0])[:, None] + 0.5
    return (box[0] <= x) & (x <= box[2]) & (box[1] <= y) & (y <= box[3])


def shade(photo: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The photo, grey and pale where the model did not see it."""
    pixels = np.array(photo)
    unseen = ~inside(pixels.shape[:2], box)
    pixels[unseen] = (127.5 + 0.5 * pixels[unseen].mean(-1, keepdims=True)).astype(np.uint8)
    return Image.fromarray(pixels)


def to_html(explanation: Explanation, colors: np.ndarray, opacity: float, depth: int) -> str:
    """The page's main part. `depth` counts from 1, shallow to deep."""
    label = html.escape(explanation.label)
    photo = _data_uri(shade(explanation.photo, explanation.box), "WEBP", quality=90)
    groups = []
    for title in dict.fromkeys(one.title for one in explanation.maps):
        figures = [_figure(one, explanation, colors) for one in explanation.maps if one.title == title]
        groups.append(_group(title, figures))
    depths = [
        _figure(one, explanation, colors, hidden=number != depth, number=number)
        for number, one in enumerate(explanation.attention, start=1)
    ]
    original = (
        '<figure><div class="photo" role="img" aria-label="The image"></div><figcaption>the image</figcaption></figure>'
    )
    groups.insert(0, _group(explanation.attention_title, [original, *depths]))
    ratio = f"{explanation.photo.width} / {explanation.photo.height}"
    return (
        f'<section id="explanation" style="--opacity: {opacity}; --ratio: {ratio}; --photo: url({photo})">'
        f'<h2>What speaks for “{label}”?</h2><div class="methods">{"".join(groups)}</div>'
        f"{_legend(colors, explanation)}<p>{HOW_TO_READ}</p></section>"
    )


def _group(title: str, figures: list[str]) -> str:
    return f'<div class="method"><h3>{title}</h3><div class="pair">{"".join(figures)}</div></div>'


def _figure(
    one: Map, explanation: Explanation, colors: np.ndarray, hidden: bool = False, number: int | None = None
) -> str:
    label = html.escape(explanation.label)
    source = _data_uri(colorize(one.saliency, colors, explanation.box), "PNG")
    if number is None:
        alt = f"{one.title} under {POOLINGS[one.pooling]} for {label}"
        caption = f"<b>{POOLINGS[one.pooling]}</b> {one.before:.1%} → {one.after:.1%}"
    else:
        uniform = "" if one.saliency.any() else ", uniform: nothing stands out"
        caption = f"depth {number}: {html.escape(one.title)}{uniform}"
        alt = f"Raw attention, {caption}"
    return (
        f'<figure{f""" data-depth="{number}" """ if number else ""}{" hidden" if hidden else ""}><div class="photo">'
        f'<img src="{source}" alt="{alt}"></div><figcaption>{caption}</figcaption></figure>'
    )


def _legend(colors: np.ndarray, explanation: Explanation) -> str:
    stops = ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in colors[:: len(colors) // 15].tolist())
    whole = inside((explanation.photo.height, explanation.photo.width), explanation.box).all()
    note = "" if whole else '<span class="note">Pale grey: cut off before the model, it did not see it.</span>'
    return (
        '<div class="legend"><span>least</span>'
        '<div class="bar" role="img" aria-label="Colour scale from least to most" '
        f'style="background: linear-gradient(to right, {stops})"></div>'
        f"<span>most</span>{note}</div>"
    )


def _data_uri(image: Image.Image, form: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def overlay(one: Map, explanation: Explanation, colors: np.ndarray, opacity: float) -> Image.Image:
    """What the page shows for a map: the photo under its colours."""
    heat = colorize(one.saliency, colors, explanation.box)
    heat.putalpha(heat.getchannel("A").point(lambda value: round(value * opacity)))
    return Image.alpha_composite(shade(explanation.photo, explanation.box).convert("RGBA"), heat).convert("RGB")


def to_picture(explanation: Explanation, colors: np.ndarray, opacity: float, depth: int) -> Image.Image:
    """The same as one picture: a row per method, the network's own pooling left and CA right, and one of evidence; with
    its legend."""
    attention = explanation.attention[depth - 1]
    cells = [
        (f"{explanation.label}", explanation.photo),
        (f"Raw attention, {attention.title}", overlay(attention, explanation, colors, opacity)),
    ]
    for one in explanation.maps:
        text = f"{one.title}, {POOLINGS[one.pooling]}: {one.before:.1%} → {one.after:.1%}"
        cells.append((text, overlay(one, explanation, colors, opacity)))
    height = round(_CELL * explanation.photo.height / explanation.photo.width)
    if len(explanation.maps) % 2:  # one evidence block: its row has one cell, so that the others stay in pairs
        cells.insert(3, ("", Image.new("RGB", (_CELL, height), _PAPER)))
    rows, step = len(cells) // 2, height + 34
    canvas = Image.new("RGB", (2 * _CELL + 3 * _MARGIN, rows * step + 56), _PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for index, (text, picture) in enumerate(cells):
        left, top = _MARGIN + (index % 2) * (_CELL + _MARGIN), (index // 2) * step
        while font.getlength(text) > _CELL:
            text = text[:-2] + "…"
        draw.text((left, top + 8), text, fill=_INK, font=font)
        canvas.paste(picture.resize((_CELL, height), Image.Resampling.LANCZOS), (left, top + 30))
    bar = Image.fromarray(colors[None].repeat(12, 0)).resize((2 * _CELL + _MARGIN, 12))
    canvas.paste(bar, (_MARGIN, rows * step + 10))
    draw.text((_MARGIN, rows * step + 26), "least", fill=_INK, font=font)
    draw.text((2 * _CELL + 2 * _MARGIN, rows * step + 26), "most", fill=_INK, font=font, anchor="ra")
    return canvas
