"""A contact sheet: a row per photo, a column per map, each with its class and score above."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modeling_castream.methods_castream import METHODS

CELL, MARGIN, TEXT = 240, 10, 18  # pixels: a picture's longest side, the space around it, a line of text
INK, FAINT, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)
MOST_ROWS = 40  # beyond this the sheet is too long to look at; the overlays are there for every photo


class ContactSheet:
    """Collects thumbnails, so that it stays small however large and many the photos are.

    Args:
        title: stands above the rows.
        colors: (256, 3) uint8, the colour map of the overlays.
    """

    def __init__(self, title: str, colors: np.ndarray):
        self.title, self.colors = title, colors
        self.rows: list[list[tuple[Image.Image, str, str]]] = []
        self.left_out = 0

    def add(self, name: str, photo: Image.Image, answers: list[dict]) -> None:
        """Add a photo and its maps, or count it as left out where the sheet is full."""
        if len(self.rows) == MOST_ROWS:
            self.left_out += 1
            return
        cells = [(_thumbnail(photo), name, f"{photo.width} x {photo.height}")]
        for answer in answers:
            how = f"{METHODS[answer['method']].title}, {answer['pooling'].upper()}"
            cells.append((_thumbnail(answer["overlay"]), f"{answer['score']:.1%}  {answer['label']}", how))
        self.rows.append(cells)

    def draw(self) -> Image.Image:
        """The sheet, RGB."""
        heights = [max(picture.height for picture, *_ in row) + 2 * TEXT + MARGIN for row in self.rows]
        width = max(map(len, self.rows)) * (CELL + MARGIN) + MARGIN
        top = 2 * MARGIN + TEXT
        canvas = Image.new("RGB", (width, top + sum(heights) + 2 * TEXT + MARGIN), PAPER)
        draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
        draw.text((MARGIN, MARGIN), _shorten(self.title, font, width - 2 * MARGIN), fill=INK, font=font)
        for row, height in zip(self.rows, heights, strict=True):
            for column, (picture, *lines) in enumerate(row):
                left = MARGIN + column * (CELL + MARGIN)
                for number, (line, ink) in enumerate(zip(lines, (INK, FAINT), strict=True)):
                    draw.text((left, top + number * TEXT), _shorten(line, font, CELL), fill=ink, font=font)
                canvas.paste(picture, (left, top + 2 * TEXT))
            top += height
        self._draw_legend(canvas, draw, font, top)
        return canvas

    def _draw_legend(self, canvas: Image.Image, draw: ImageDraw.ImageDraw, font, top: int) -> None:
        bar = Image.fromarray(self.colors[None].repeat(10, 0))
        canvas.paste(bar.resize((CELL, 10)), (MARGIN, top))
        note = "least to most, within each map"
        if self.left_out:
            note += f"; {self.left_out} more photos have overlays only"
        draw.text((MARGIN, top + 14), note, fill=FAINT, font=font)


def _thumbnail(image: Image.Image) -> Image.Image:
    copy = image.copy()
    copy.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return copy


def _shorten(text: str, font, width: int) -> str:
    """As much of a text as fits into `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
