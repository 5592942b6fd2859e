"""Procedural scenes: a textured, lit object on a cluttered background, and the pixel mask that says where it is.

Every scene depends on (seed, split, index) only, so that any one can be drawn again, in any order, on any number of processes. Colours,
textures, light, place and background are drawn independently of the class: only the silhouette tells the classes apart.
"""

import io
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .rendering_shapes import SILHOUETTES, Part, distractor

CLASS_NAMES: tuple[str, ...] = tuple(sorted(SILHOUETTES))

SUPERSAMPLING = 2
JPEG_QUALITY = 92
OBJECT_AREA = (
    0.08,
    0.30,
)  # share of the image that the silhouette aims at; occluders and the frame may take some of it away
TEXTURES = ("plain", "stripes", "dots", "checks", "clouds", "grain", "speckle")


@dataclass(frozen=True)
class Scene:
    """One example: `image` (RGB), `mask` ("L": 255 on the object's visible pixels, else 0) of the same size, and the class id `label`."""

    image: Image.Image
    mask: Image.Image
    label: int


class Light(NamedTuple):
    """A distant light: unit `direction` towards it (x right, y down, z to the viewer), share of `ambient` light."""

    direction: np.ndarray
    ambient: float


class Placement(NamedTuple):
    """Unit coordinates to pixels: `matrix` (2, 2), then `centre` (2,)."""

    matrix: np.ndarray
    centre: np.ndarray


class Coverage(NamedTuple):
    """Antialiased rasters in [0, 1] of a silhouette, cropped to `window` (rows, columns) of the image."""

    window: tuple[slice, slice]
    body: np.ndarray
    accent: np.ndarray
    ink: np.ndarray


def render_scene(
    seed: int, index: int, size: int = 224, label: int | None = None, split: str = "train", with_object: bool = True
) -> Scene:
    """Draw example `index` of a split.

    Args:
        seed: of the whole dataset, >= 0.
        index: of the example within its split, >= 0.
        size: height and width in pixels, >= 32.
        label: class id; None means `balanced_label(seed, index, split)`.
        split: a name; different names give different scenes.
        with_object: False leaves the object and its shadow out and keeps all else as it was; the mask is then empty.

    Raises:
        ValueError: for a size below 32 or an unknown label.
    """
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels, got {size}")
    label = balanced_label(seed, index, split) if label is None else label
    if not 0 <= label < len(CLASS_NAMES):
        raise ValueError(f"label must be in 0..{len(CLASS_NAMES) - 1}, got {label}")
    rngs = [np.random.default_rng(child) for child in _sequence(seed, split, index).spawn(5)]
    scenery_rng, clutter_rng, object_rng, front_rng, camera_rng = rngs
    light = _draw_light(scenery_rng)
    canvas = _scenery(size, scenery_rng)
    _add_clutter(canvas, light, clutter_rng)
    visible = np.zeros((size, size), np.float32)
    if with_object:
        _add_object(canvas, visible, CLASS_NAMES[label], light, object_rng)
    _add_occluders(canvas, visible, light, front_rng)
    mask = Image.fromarray(np.where(visible > 0.5, 255, 0).astype(np.uint8))
    return Scene(_camera(canvas, camera_rng), mask, label)


def encode_scene(seed: int, split: str, size: int, index: int) -> dict:
    """One row of the dataset, its pictures encoded as in the parquet files."""
    scene = render_scene(seed, index, size, split=split)
    image, mask = io.BytesIO(), io.BytesIO()
    scene.image.save(image, "JPEG", quality=JPEG_QUALITY)
    scene.mask.save(mask, "PNG")
    name = f"{split}-{index:06d}"
    return {
        "image": {"bytes": image.getvalue(), "path": f"{name}.jpg"},
        "mask": {"bytes": mask.getvalue(), "path": f"{name}-mask.png"},
        "label": scene.label,
        "index": index,
    }


def balanced_label(seed: int, index: int, split: str = "train") -> int:
    """Class id of an example: each run of `len(CLASS_NAMES)` indices holds every class once, in an order of its own."""
    block, position = divmod(index, len(CLASS_NAMES))
    order = np.random.default_rng(_sequence(seed, split + "/labels", block)).permutation(len(CLASS_NAMES))
    return int(order[position])


def _sequence(seed: int, split: str, index: int) -> np.random.SeedSequence:
    return np.random.SeedSequence((seed, zlib.crc32(split.encode()), index))


# Scenery ------------------------------------------------------------------------------------------------------------------------------


def _draw_light(rng: np.random.Generator) -> Light:
    azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 0.85)
    planar = np.sqrt(1 - height**2)
    direction = np.array([planar * np.cos(azimuth), planar * np.sin(azimuth), height], np.float32)
    return Light(direction, float(rng.uniform(0.35, 0.55)))


def _draw_colour(rng: np.random.Generator) -> np.ndarray:
    """A colour (3,) in [0, 1], of any hue, from dull to vivid and from dark to light."""
    hue, saturation, value = rng.uniform(0, 6), rng.beta(1.6, 2.0), rng.uniform(0.2, 0.95)
    ramp = np.clip(np.abs((hue - np.array([0, 2, 4]) + 3) % 6 - 3) - 1, 0, 1)
    rgb = 1 - saturation + saturation * (1 - ramp)
    return (value * rgb).astype(np.float32)


def _clouds(height: int, width: int, cell: float, rng: np.random.Generator, octaves: int = 2) -> np.ndarray:
    """Value noise in [0, 1], (height, width), whose largest features measure about `cell` pixels."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        step = cell / 2**octave
        grid = rng.random((int(height / step) + 2, int(width / step) + 2), dtype=np.float32)
        total += np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    return np.clip(total / (2 - 2.0 ** (1 - octaves)), 0, 1)


def _texture(kind: str, height: int, width: int, cell: float, rng: np.random.Generator) -> np.ndarray:
    """A pattern in [0, 1], (height, width), with a period of about `cell` pixels."""
    if kind == "plain":
        return np.zeros((height, width), np.float32)
    if kind == "clouds":
        return np.clip(2.2 * _clouds(height, width, 1.5 * cell, rng, octaves=3) - 0.6, 0, 1)
    if kind == "speckle":
        return np.clip(6 * _clouds(height, width, 0.4 * cell, rng, octaves=1) - 4, 0, 1)
    angle = rng.uniform(0, np.pi)
    y, x = np.ogrid[0:height, 0:width]
    wave = np.float32(2 * np.pi / cell)
    u = wave * (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)))
    v = wave * (y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle)))
    if kind == "grain":
        return 0.5 + 0.5 * np.sin(u + 9 * _clouds(height, width, 3 * cell, rng))
    if kind == "stripes":
        return np.clip(0.5 + rng.choice([0.5, 3.0]) * np.sin(u), 0, 1)
    if kind == "dots":
        return np.clip(3 * (np.cos(u) + np.cos(v) - rng.uniform(0.6, 1.1)), 0, 1)
    return np.clip(0.5 + 3 * np.sin(u) * np.sin(v), 0, 1)  # checks


def _surface(height: int, width: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A textured stretch of background, (height, width, 3), in an image of `size` pixels."""
    colour, kind = _draw_colour(rng), rng.choice(TEXTURES)
    contrast = rng.uniform(0.2, 0.8)
    second = colour + contrast * (_draw_colour(rng) - colour)
    pattern = _texture(str(kind), height, width, size * rng.uniform(0.04, 0.25), rng)
    shade = 0.6 + 0.8 * _clouds(height, width, size * rng.uniform(0.3, 0.8), rng, octaves=3)
    return (colour + pattern[..., None] * (second - colour)) * shade[..., None]


def _scenery(size: int, rng: np.random.Generator) -> np.ndarray:
    """The empty background, (size, size, 3) float32 in about [0, 1]: one surface, or two that meet in a horizon or a slanted edge."""
    canvas = _surface(size, size, size, rng)
    if rng.random() < 0.6:
        slope, level = rng.normal(0, 0.25), rng.uniform(0.2, 0.8)
        y, x = np.ogrid[0:size, 0:size]
        below = np.clip(y - size * (level + slope * (x / size - 0.5)), 0, 1).astype(np.float32)[..., None]
        if rng.random() < 0.3:
            below = below.swapaxes(0, 1)
        canvas += below * (_surface(size, size, size, rng) - canvas)
    return canvas


def _add_clutter(canvas: np.ndarray, light: Light, rng: np.random.Generator) -> None:
    """Flat scraps and lines first, then lit shapes of no class, some as large as an object; a lens may leave all of it out of focus."""
    size = len(canvas)
    _add_scraps(canvas, rng)
    for _ in range(rng.integers(3, 9)):
        scale = size * rng.uniform(0.05, 0.24)
        placement = _place(rng.uniform(0, size, 2), scale, rng.uniform(0, 2 * np.pi), rng)
        _paint(canvas, _rasterize(distractor(rng), placement, size), scale, _draw_colour(rng), light, rng)
    if rng.random() < 0.35:
        image = _to_image(canvas).filter(ImageFilter.GaussianBlur(size * rng.uniform(0.003, 0.012)))
        canvas[:] = np.asarray(image, np.float32) / 255


def _add_scraps(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Polygons, ellipses and lines of one colour each, half transparent as one layer."""
    size = len(canvas)
    layer = Image.new("RGBA", (SUPERSAMPLING * size,) * 2)
    draw = ImageDraw.Draw(layer)
    for _ in range(rng.integers(6, 26)):
        fill = (*(int(255 * channel) for channel in _draw_colour(rng)), int(rng.integers(90, 256)))
        corner, extent = rng.uniform(-0.1, 1.0, 2), rng.uniform(0.02, 0.25, 2)
        kind = rng.integers(3)
        if kind == 0:
            points = corner + extent * rng.uniform(0, 1, (int(rng.integers(3, 6)), 2))
            draw.polygon([tuple(p) for p in SUPERSAMPLING * size * points], fill=fill)
        elif kind == 1:
            draw.ellipse(tuple(SUPERSAMPLING * size * np.concatenate([corner, corner + extent])), fill=fill)
        else:
            stop = corner + rng.normal(0, 0.4, 2)
            width = int(SUPERSAMPLING * size * rng.uniform(0.004, 0.025)) + 1
            draw.line(tuple(SUPERSAMPLING * size * np.concatenate([corner, stop])), fill=fill, width=width)
    scraps = np.asarray(layer.reduce(SUPERSAMPLING), np.float32) / 255
    canvas += scraps[..., 3:] * rng.uniform(0.4, 0.95) * (scraps[..., :3] - canvas)


# Objects ------------------------------------------------------------------------------------------------------------------------------


def _place(centre: np.ndarray, scale: float, angle: float, rng: np.random.Generator) -> Placement:
    """Rotate by `angle`, mirror at random, stretch and shear a little."""
    cos, sin = np.cos(angle), np.sin(angle)
    stretch = np.diag([rng.choice([-1, 1]) * rng.uniform(0.88, 1.12), 1.0])
    shear = np.array([[1, rng.uniform(-0.12, 0.12)], [0, 1]])
    return Placement(scale * np.array([[cos, -sin], [sin, cos]]) @ shear @ stretch, centre)


def _rasterize(parts: list[Part], placement: Placement, size: int) -> Coverage | None:
    """Draw a silhouette, antialiased; None if it lies outside the image."""
    outlines = [part.points @ placement.matrix.T + placement.centre for part in parts]
    corners = np.concatenate(outlines)
    left, top = np.clip(np.floor(corners.min(0)) - 1, 0, size).astype(int)
    right, bottom = np.clip(np.ceil(corners.max(0)) + 1, 0, size).astype(int)
    if right - left < 2 or bottom - top < 2:
        return None
    layers = {
        name: Image.new("L", (SUPERSAMPLING * int(right - left), SUPERSAMPLING * int(bottom - top)))
        for name in ("body", "accent", "ink")
    }
    draws = {name: ImageDraw.Draw(layer) for name, layer in layers.items()}
    for part, outline in zip(parts, outlines, strict=True):
        flat = (SUPERSAMPLING * (outline - (left, top)) - 0.5).ravel().tolist()
        draws["body" if part.layer == "hole" else part.layer].polygon(flat, fill=0 if part.layer == "hole" else 255)
        if part.layer == "body":  # what is added later lies in front of what was coloured before
            draws["accent"].polygon(flat, fill=0)
            draws["ink"].polygon(flat, fill=0)
    rasters = {name: np.asarray(layer.reduce(SUPERSAMPLING), np.float32) / 255 for name, layer in layers.items()}
    return Coverage((slice(top, bottom), slice(left, right)), **rasters)


def _blur(values: np.ndarray, radius: int) -> np.ndarray:
    """Two box blurs of the given radius along each axis, zero outside; (height, width) -> the same."""
    width = 2 * radius + 1
    for _ in range(2):
        for axis in (0, 1):
            padding = [(radius + 1, radius) if a == axis else (0, 0) for a in (0, 1)]
            sums = np.cumsum(np.pad(values, padding), axis=axis, dtype=np.float32)
            ahead, behind = (slice(width, None), slice(None)), (slice(None, -width), slice(None))
            values = (sums[ahead if axis == 0 else ahead[::-1]] - sums[behind if axis == 0 else behind[::-1]]) / width
    return values


def _relief_light(
    body: np.ndarray, scale: float, light: Light, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Diffuse factor and specular highlight, (height, width) each, of the silhouette swollen into a rounded, slightly rough body."""
    radius = max(1, int(scale * rng.uniform(0.08, 0.2)))
    padded = np.pad(body, 2 * radius + 2)
    inside = slice(2 * radius + 2, -2 * radius - 2)
    relief = _blur(padded, radius)[inside, inside] * (radius * rng.uniform(1.5, 4.0))
    roughness = rng.choice([0.0, 0.03, 0.08]) * scale
    relief = relief + roughness * _clouds(*body.shape, max(3.0, 0.12 * scale), rng, octaves=1)
    slope_y, slope_x = np.gradient(relief)
    norm = 1 / np.sqrt(slope_x**2 + slope_y**2 + 1)
    diffuse = np.clip((light.direction[2] - slope_x * light.direction[0] - slope_y * light.direction[1]) * norm, 0, 1)
    half = light.direction + np.array([0, 0, 1], np.float32)  # halfway between the light and the viewer (Blinn-Phong)
    half = half / np.sqrt((half**2).sum())
    mirror = np.clip((half[2] - slope_x * half[0] - slope_y * half[1]) * norm, 0, 1)
    return light.ambient + (1.15 - light.ambient) * diffuse, rng.choice([0.0, 0.2, 0.5]) * mirror ** float(
        rng.uniform(12, 50)
    )


def _paint(
    canvas: np.ndarray,
    coverage: Coverage | None,
    scale: float,
    colour: np.ndarray,
    light: Light,
    rng: np.random.Generator,
) -> None:
    """Cast the shadow of a shape on `canvas` and paint it there in `colour`, with a texture, a second colour and light; in place."""
    if coverage is None:
        return
    body = coverage.body
    height, width = body.shape
    _cast_shadow(canvas, coverage, scale, light, rng)
    second = np.clip(colour + rng.uniform(0.25, 0.75) * (_draw_colour(rng) - colour), 0, 1)
    accent_colour = np.clip(_draw_colour(rng) + rng.uniform(-0.1, 0.1), 0, 1)
    pattern = _texture(str(rng.choice(TEXTURES)), height, width, scale * rng.uniform(0.15, 0.6), rng)[..., None]
    paint = colour + pattern * (second - colour)
    paint = paint + coverage.accent[..., None] * (accent_colour + 0.3 * pattern * (second - accent_colour) - paint)
    paint = paint * (1 - rng.uniform(0.45, 0.8) * coverage.ink[..., None])
    diffuse, highlight = _relief_light(body, scale, light, rng)
    across = (
        np.linspace(-1, 1, width)[None, :] * light.direction[0]
        + np.linspace(-1, 1, height)[:, None] * light.direction[1]
    )
    diffuse = diffuse * (1 + rng.uniform(0, 0.3) * across)
    lit = paint * diffuse[..., None] + highlight[..., None]
    target = canvas[coverage.window]
    target += body[..., None] * (lit - target)


def _cast_shadow(canvas: np.ndarray, coverage: Coverage, scale: float, light: Light, rng: np.random.Generator) -> None:
    """Darken `canvas`, in place, where the shape stands between it and the light."""
    size, reach = len(canvas), scale * rng.uniform(0.08, 0.25)
    shift_y, shift_x = (-np.round(reach * light.direction[[1, 0]])).astype(int)
    rows, columns = coverage.window
    radius = max(1, int(scale * rng.uniform(0.03, 0.1)))
    margin = 2 * radius
    shadow = _blur(np.pad(coverage.body, margin), radius) * rng.uniform(0.25, 0.6)
    top, left = rows.start + shift_y - margin, columns.start + shift_x - margin
    bottom, right = top + shadow.shape[0], left + shadow.shape[1]
    inside = shadow[
        max(0, -top) : shadow.shape[0] - max(0, bottom - size), max(0, -left) : shadow.shape[1] - max(0, right - size)
    ]
    canvas[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] *= 1 - inside[..., None]


def _add_object(canvas: np.ndarray, visible: np.ndarray, name: str, light: Light, rng: np.random.Generator) -> None:
    """Paint an object of the named class on `canvas` and its coverage on `visible`, both in place."""
    size = len(canvas)
    parts = SILHOUETTES[name](rng)
    angle = np.radians(rng.uniform(-50, 50))
    unit = _place(np.zeros(2), 1.0, angle, rng)
    corners = np.concatenate([part.points for part in parts]) @ unit.matrix.T
    low, high = corners.min(0), corners.max(0)
    trial = _rasterize(parts, Placement(20 * unit.matrix, 32 - 10 * (low + high)), 64)
    target_area = size**2 * np.exp(rng.uniform(*np.log(OBJECT_AREA)))
    scale = min(float(np.sqrt(target_area / (trial.body.sum() / 400))), size * 0.98 / (high - low).max())
    room = size - scale * (high - low)
    centre = rng.uniform(0, 1, 2) * room - scale * low
    coverage = _rasterize(parts, Placement(scale * unit.matrix, centre), size)
    around = canvas[coverage.window][coverage.body > 0.5].mean(0)
    candidates = [_draw_colour(rng) for _ in range(3)]
    colour = max(
        candidates[: int(rng.integers(1, 4))], key=lambda c: np.abs(c - around).sum()
    )  # some blend in, most do not
    _paint(canvas, coverage, scale, colour, light, rng)
    visible[coverage.window] = coverage.body


def _add_occluders(canvas: np.ndarray, visible: np.ndarray, light: Light, rng: np.random.Generator) -> None:
    """Up to three shapes of no class in front of everything, in the colours of what is there; what they hide is not `visible`."""
    size = len(canvas)
    for _ in range(rng.integers(0, 4)):
        scale = size * rng.uniform(0.04, 0.13)
        coverage = _rasterize(
            distractor(rng), _place(rng.uniform(0, size, 2), scale, rng.uniform(0, 2 * np.pi), rng), size
        )
        row, column = rng.integers(0, size, 2)
        if coverage is None:
            continue
        # The colour comes from the clutter, never from the object, so that a scene without its object differs in the object alone.
        _paint(canvas, coverage, scale, 0.6 * _draw_colour(rng) + 0.2, light, rng)
        visible[coverage.window] *= 1 - coverage.body


def _camera(canvas: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Exposure, white balance, vignette, lens blur and sensor noise; each pixel stays a rising function of the light that falls on it."""
    size = len(canvas)
    gain = rng.uniform(0.8, 1.2) * (1 + rng.uniform(-0.1, 0.1, 3).astype(np.float32))
    axis = np.linspace(-1, 1, size, dtype=np.float32) ** 2
    vignette = 1 - rng.uniform(0, 0.3) * (axis[:, None] + axis[None, :]) / 2
    image = _to_image(canvas * gain.astype(np.float32) * vignette[..., None].astype(np.float32))
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.001, 0.004)))
    noise = rng.standard_normal((size, size, 3), dtype=np.float32) * rng.uniform(0.005, 0.04)
    return _to_image(np.asarray(image, np.float32) / 255 + noise)


def _to_image(canvas: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8))
