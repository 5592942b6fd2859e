"""Procedural scenes: a textured, lit object on a cluttered background, and the pixel mask that says where it is.

Every scene depends on (seed, split, index) only, so that any one can be drawn again, in any order, on any number of
processes. Colours, textures, light, place and background are drawn independently of the class: only the silhouette
tells the classes apart. Pictures are built as planes, (3, height, width) float32 with light in about [0, 1], because
arithmetic on planes is several times faster than on interleaved pixels.
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .shapes import SILHOUETTES, Part, distractor

CLASS_NAMES: tuple[str, ...] = tuple(sorted(SILHOUETTES))

MIN_SIZE = 32  # pixels; smaller objects are no longer recognisable
SUPERSAMPLING = 2
OBJECT_AREA = (0.09, 0.35)  # share of the image that a silhouette aims at; fitting the frame may keep it smaller
TEXTURES = ("plain", "stripes", "dots", "checks", "clouds", "grain", "speckle")


@dataclass(frozen=True)
class Scene:
    """One example: `image` (RGB), `mask` ("L": 255 where the object is visible, else 0) and the class id `label`."""

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
    """Antialiased rasters in [0, 1] of a silhouette, cropped to `window` (rows, columns); None if empty."""

    window: tuple[slice, slice]
    body: np.ndarray
    accent: np.ndarray | None
    ink: np.ndarray | None


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
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE} pixels, got {size}")
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


def balanced_label(seed: int, index: int, split: str = "train") -> int:
    """Class id of an example: each run of `len(CLASS_NAMES)` indices holds every class once, in an order of its own."""
    block, position = divmod(index, len(CLASS_NAMES))
    order = np.random.default_rng(_sequence(seed, split + "/labels", block)).permutation(len(CLASS_NAMES))
    return int(order[position])


def _sequence(seed: int, split: str, index: int) -> np.random.SeedSequence:
    return np.random.SeedSequence((seed, zlib.crc32(split.encode()), index))


# Scenery


def _draw_light(rng: np.random.Generator) -> Light:
    azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 0.85)
    planar = np.sqrt(1 - height**2)
    direction = np.array([planar * np.cos(azimuth), planar * np.sin(azimuth), height], np.float32)
    return Light(direction, rng.uniform(0.35, 0.55))


def _draw_colour(rng: np.random.Generator) -> np.ndarray:
    """A colour (3, 1, 1) in [0, 1], of any hue, from dull to vivid and from dark to light."""
    hue, saturation, value = rng.uniform(0, 6), rng.beta(1.3, 2.8), rng.uniform(0.25, 1.0)
    ramp = (min(max(abs((hue - peak + 3) % 6 - 3) - 1, 0.0), 1.0) for peak in (0, 2, 4))  # 0 at each channel's own hue
    return np.array([value * (1 - saturation * fall) for fall in ramp], np.float32)[:, None, None]


def _clouds(height: int, width: int, cell: float, rng: np.random.Generator, octaves: int = 2) -> np.ndarray:
    """Value noise in [0, 1], (height, width), whose largest features measure about `cell` pixels."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        step = cell / 2**octave
        grid = rng.random((int(height / step) + 2, int(width / step) + 2), dtype=np.float32)
        total += _resize(grid, height, width) * (0.5**octave / (2 - 0.5 ** (octaves - 1)))
    return np.clip(total, 0, 1)


def _resize(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))


def _texture(kind: str, height: int, width: int, cell: float, rng: np.random.Generator) -> np.ndarray:
    """A pattern in [0, 1], (height, width), with a period of about `cell` pixels."""
    if kind == "plain":
        return np.zeros((height, width), np.float32)
    if kind == "clouds":
        return np.clip(2.2 * _clouds(height, width, 1.5 * cell, rng, octaves=3) - 0.6, 0, 1)
    if kind == "speckle":
        return np.clip(6 * _clouds(height, width, 0.4 * cell, rng, octaves=1) - 4, 0, 1)
    angle = rng.uniform(0, np.pi)
    x = np.arange(width, dtype=np.float32)[None, :] * (2 * np.pi / cell)
    y = np.arange(height, dtype=np.float32)[:, None] * (2 * np.pi / cell)
    u = x * float(np.cos(angle)) + y * float(np.sin(angle))
    if kind == "grain":
        return 0.5 + 0.5 * np.sin(u + 9 * _clouds(height, width, 3 * cell, rng))
    if kind == "stripes":
        return np.clip(0.5 + rng.uniform(0.5, 3) * np.sin(u), 0, 1)
    v = y * float(np.cos(angle)) - x * float(np.sin(angle))
    if kind == "dots":
        return np.clip(3 * (np.cos(u) + np.cos(v) - rng.uniform(0.6, 1.1)), 0, 1)
    return np.clip(0.5 + 3 * np.sin(u) * np.sin(v), 0, 1)  # checks


def _surface(size: int, rng: np.random.Generator) -> np.ndarray:
    """A textured, unevenly lit background, (3, size, size)."""
    colour, kind = _draw_colour(rng), TEXTURES[rng.integers(len(TEXTURES))]
    second = colour + rng.uniform(0.2, 0.8) * (_draw_colour(rng) - colour)
    pattern = _texture(kind, size, size, size * rng.uniform(0.04, 0.25), rng)
    shade = 0.6 + 0.8 * _clouds(size, size, size * rng.uniform(0.3, 0.8), rng, octaves=3)
    return (colour + pattern * (second - colour)) * shade


def _scenery(size: int, rng: np.random.Generator) -> np.ndarray:
    """The empty background, (3, size, size): one surface, or two that meet in a horizon or a slanted edge."""
    canvas = _surface(size, rng)
    if rng.random() < 0.6:
        slope, level = rng.normal(0, 0.25), rng.uniform(0.2, 0.8)
        x = np.arange(size, dtype=np.float32)
        below = np.clip(x[:, None] - size * (level + slope * (x[None, :] / size - 0.5)), 0, 1)
        below = below.T if rng.random() < 0.3 else below
        canvas += below * (_surface(size, rng) - canvas)
    return canvas


def _add_clutter(canvas: np.ndarray, light: Light, rng: np.random.Generator) -> None:
    """Flat scraps first, then lit shapes of no class, some as large as an object, all of it at times out of focus."""
    size = canvas.shape[-1]
    _add_scraps(canvas, rng)
    for _ in range(rng.integers(3, 9)):
        _paint_distractor(canvas, size * rng.uniform(0.05, 0.24), light, rng)
    if rng.random() < 0.35:
        canvas[:] = _to_planes(_to_image(canvas).filter(ImageFilter.GaussianBlur(size * rng.uniform(0.003, 0.012))))


def _add_scraps(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Polygons, ellipses and lines of one colour each, as one half-transparent layer."""
    size = SUPERSAMPLING * canvas.shape[-1]
    layer, opacity = Image.new("RGB", (size, size)), Image.new("L", (size, size))  # colours times opacity, and opacity
    for _ in range(rng.integers(6, 26)):
        strength = rng.uniform(0.35, 1)
        fills = (tuple(int(255 * strength * channel) for channel in _draw_colour(rng).ravel()), int(255 * strength))
        corner, extent = rng.uniform(-0.1, 1.0, 2), rng.uniform(0.02, 0.25, 2)
        kind, width = rng.integers(3), int(size * rng.uniform(0.004, 0.025)) + 1
        polygon = (size * (corner + extent * rng.uniform(0, 1, (int(rng.integers(3, 6)), 2)))).ravel().tolist()
        box = (size * np.concatenate([corner, corner + extent])).tolist()
        line = (size * np.concatenate([corner, corner + rng.normal(0, 0.4, 2)])).tolist()
        for draw, fill in zip((ImageDraw.Draw(layer), ImageDraw.Draw(opacity)), fills, strict=True):
            if kind == 0:
                draw.polygon(polygon, fill=fill)
            elif kind == 1:
                draw.ellipse(box, fill=fill)
            else:
                draw.line(line, fill=fill, width=width)
    share = rng.uniform(0.4, 0.95)
    canvas *= 1 - share * (np.asarray(opacity.reduce(SUPERSAMPLING), np.float32) / 255)
    canvas += share * _to_planes(layer.reduce(SUPERSAMPLING))


# Objects


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
    left, top = (int(v) for v in np.clip(np.floor(corners.min(0)) - 1, 0, size))
    right, bottom = (int(v) for v in np.clip(np.ceil(corners.max(0)) + 1, 0, size))
    if right - left < 2 or bottom - top < 2:
        return None
    extent = (SUPERSAMPLING * (right - left), SUPERSAMPLING * (bottom - top))
    layers = {name: Image.new("L", extent) for name in {part.layer for part in parts} - {"hole"}}
    draws = {name: ImageDraw.Draw(layer) for name, layer in layers.items()}
    for part, outline in zip(parts, outlines, strict=True):
        flat = (SUPERSAMPLING * (outline - (left, top)) - 0.5).ravel().tolist()
        draws["body" if part.layer == "hole" else part.layer].polygon(flat, fill=0 if part.layer == "hole" else 255)
        if part.layer == "body":  # what is added later lies in front of what was coloured before
            for name in layers.keys() - {"body"}:
                draws[name].polygon(flat, fill=0)
    rasters = {name: np.asarray(layer.reduce(SUPERSAMPLING), np.float32) / 255 for name, layer in layers.items()}
    window = (slice(top, bottom), slice(left, right))
    return Coverage(window, rasters["body"], rasters.get("accent"), rasters.get("ink"))


def _blur(plane: np.ndarray, radius: int) -> np.ndarray:
    """Blur (height, width) smoothly over about `radius` pixels: shrink by that factor, then enlarge again."""
    height, width = plane.shape
    small = (max(2, round(width / radius)), max(2, round(height / radius)))
    return _resize(np.asarray(Image.fromarray(plane).resize(small, Image.Resampling.BILINEAR)), height, width)


def _relief_light(
    body: np.ndarray, scale: float, light: Light, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Diffuse factor and specular highlight, (height, width) each, of the silhouette swollen into a rounded body."""
    radius = max(2, int(scale * rng.uniform(0.12, 0.25)))
    margin = 2 * radius
    relief = _blur(np.pad(body, margin), radius)[margin:-margin, margin:-margin] * (radius * rng.uniform(1.5, 4.0))
    roughness = scale * (0.0, 0.0, 0.02, 0.06)[rng.integers(4)]
    if roughness:
        relief = relief + roughness * _clouds(*body.shape, max(3.0, scale * rng.uniform(0.08, 0.2)), rng, octaves=1)
    slope_y, slope_x = np.gradient(relief)
    norm = 1 / np.sqrt(slope_x**2 + slope_y**2 + 1)
    x, y, z = (float(component) for component in light.direction)
    diffuse = np.clip((z - slope_x * x - slope_y * y) * norm, 0, 1)
    half = float(np.sqrt(x**2 + y**2 + (z + 1) ** 2))  # halfway between light and viewer, before scaling (Blinn-Phong)
    mirror = np.clip((z + 1 - slope_x * x - slope_y * y) * norm / half, 0, 1)
    shine = (0.0, 0.2, 0.5)[rng.integers(3)]
    return light.ambient + (1.15 - light.ambient) * diffuse, shine * mirror ** rng.uniform(12, 50)


def _paint(
    canvas: np.ndarray, coverage: Coverage, scale: float, colour: np.ndarray, light: Light, rng: np.random.Generator
) -> None:
    """Put a shape of about `scale` pixels on `canvas`, in place: its shadow, then the shape, textured and lit."""
    height, width = coverage.body.shape
    _cast_shadow(canvas, coverage, scale, light, rng)
    second = colour + rng.uniform(0.25, 0.75) * (_draw_colour(rng) - colour)
    kind = TEXTURES[rng.integers(len(TEXTURES))]
    pattern = _texture(kind, height, width, scale * rng.uniform(0.15, 0.6), rng)
    paint = colour + pattern * (second - colour)
    if coverage.accent is not None:
        third = _draw_colour(rng)
        paint += coverage.accent * (third + 0.3 * pattern * (second - third) - paint)
    diffuse, highlight = _relief_light(coverage.body, scale, light, rng)
    falloff = rng.uniform(0, 0.3)
    across = np.linspace(-falloff, falloff, width, dtype=np.float32)[None, :] * float(light.direction[0])
    down = np.linspace(-falloff, falloff, height, dtype=np.float32)[:, None] * float(light.direction[1])
    diffuse = diffuse * (1 + across + down)
    if coverage.ink is not None:
        diffuse *= 1 - rng.uniform(0.45, 0.8) * coverage.ink
    target = canvas[(slice(None), *coverage.window)]
    target += coverage.body * (paint * diffuse + highlight - target)


def _cast_shadow(canvas: np.ndarray, coverage: Coverage, scale: float, light: Light, rng: np.random.Generator) -> None:
    """Darken `canvas`, in place, where the shape stands between it and the light."""
    size, reach = canvas.shape[-1], scale * rng.uniform(0.08, 0.25)
    shift_x, shift_y = (-round(reach * float(component)) for component in light.direction[:2])
    radius = max(2, int(scale * rng.uniform(0.04, 0.12)))
    margin = 2 * radius
    shadow = np.clip(_blur(np.pad(coverage.body, margin), radius), 0, 1) * rng.uniform(0.25, 0.6)
    rows, columns = coverage.window
    top, left = rows.start + shift_y - margin, columns.start + shift_x - margin
    bottom, right = top + shadow.shape[0], left + shadow.shape[1]
    inside = shadow[max(0, -top) : max(0, size - top), max(0, -left) : max(0, size - left)]
    canvas[:, max(0, top) : max(0, bottom), max(0, left) : max(0, right)] *= 1 - inside


def _paint_distractor(canvas: np.ndarray, scale: float, light: Light, rng: np.random.Generator) -> Coverage | None:
    """Put a shape of no class anywhere on `canvas`, in place, and return its coverage, if it touches the image."""
    size = canvas.shape[-1]
    placement = _place(rng.uniform(0, size, 2), scale, rng.uniform(0, 2 * np.pi), rng)
    coverage = _rasterize(distractor(rng), placement, size)
    if coverage is not None:
        _paint(canvas, coverage, scale, _draw_colour(rng), light, rng)
    return coverage


def _add_object(canvas: np.ndarray, visible: np.ndarray, name: str, light: Light, rng: np.random.Generator) -> None:
    """Paint an object of the named class on `canvas` and its coverage on `visible`, both in place."""
    size = canvas.shape[-1]
    parts = SILHOUETTES[name](rng)
    unit = _place(np.zeros(2), 1.0, np.radians(rng.uniform(-50, 50)), rng).matrix
    corners = np.concatenate([part.points for part in parts]) @ unit.T
    low, high = corners.min(0), corners.max(0)
    trial = _rasterize(parts, Placement(20 * unit, 32 - 10 * (low + high)), 64)
    unit_area = trial.body.sum() / 20**2
    target_area = size**2 * np.exp(rng.uniform(*np.log(OBJECT_AREA)))
    scale = float(min(np.sqrt(target_area / unit_area), 0.98 * size / (high - low).max()))
    centre = rng.uniform(0, 1, 2) * (size - scale * (high - low)) - scale * low
    coverage = _rasterize(parts, Placement(scale * unit, centre), size)
    around = canvas[(slice(None), *coverage.window)][:, coverage.body > 0.5].mean(1)[:, None, None]
    candidates = [_draw_colour(rng) for _ in range(rng.integers(1, 4))]
    colour = max(candidates, key=lambda candidate: np.abs(candidate - around).sum())  # some blend in, most do not
    _paint(canvas, coverage, scale, colour, light, rng)
    visible[coverage.window] = coverage.body


def _add_occluders(canvas: np.ndarray, visible: np.ndarray, light: Light, rng: np.random.Generator) -> None:
    """Up to two small shapes of no class in front of everything; what they hide is no longer `visible`."""
    for _ in range(rng.integers(0, 3)):
        coverage = _paint_distractor(canvas, canvas.shape[-1] * rng.uniform(0.04, 0.13), light, rng)
        if coverage is not None:
            visible[coverage.window] *= 1 - coverage.body


def _camera(canvas: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Exposure, white balance, vignette, lens blur and sensor noise; none of them depends on what the picture shows."""
    size = canvas.shape[-1]
    gain = rng.uniform(0.9, 1.3) * (1 + rng.uniform(-0.1, 0.1, (3, 1, 1)).astype(np.float32))
    axis = np.linspace(-1, 1, size, dtype=np.float32) ** 2
    vignette = 1 - rng.uniform(0, 0.15) * (axis[:, None] + axis[None, :])
    amplitude = rng.uniform(0.01, 0.08)
    noise = rng.random((3, size, size), dtype=np.float32) * (2 * amplitude) - amplitude
    image = _to_image(canvas * gain * vignette + noise)
    return image.filter(ImageFilter.BoxBlur(size * rng.uniform(0.001, 0.004))) if rng.random() < 0.5 else image


def _to_image(canvas: np.ndarray) -> Image.Image:
    planes = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.merge("RGB", [Image.fromarray(plane) for plane in planes])


def _to_planes(image: Image.Image) -> np.ndarray:
    return np.stack([np.asarray(band) for band in image.split()]).astype(np.float32) / 255
