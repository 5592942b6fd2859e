"""Silhouettes of the synthetic scenes: what a mug, a key or a mere distractor looks like before it is placed and lit.

A silhouette is a list of `Part`s, painted in order. Coordinates are roughly in [-1, 1], x to the right, y down.
Proportions are drawn from the generator, so that no two objects of a class are alike.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

Points = np.ndarray  # (num_points, 2), float


class Part(NamedTuple):
    """One closed polygon of a silhouette.

    `layer` is "body" (adds to the object), "hole" (takes away from it), "accent" (painted in a colour of its own) or
    "ink" (darkened). Accent and ink only show where there is body, and not under body that is added later.
    """

    layer: str
    points: Points


def _points(*pairs: tuple[float, float]) -> Points:
    return np.array(pairs, dtype=np.float64)


def _ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0) -> Points:
    angles = np.radians(np.linspace(start, stop, 40))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def _smooth(points: Points, steps: int = 6) -> Points:
    """Closed Catmull-Rom curve through `points`."""
    before, after, second = np.roll(points, 1, axis=0), np.roll(points, -1, axis=0), np.roll(points, -2, axis=0)
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    p0, p1, p2, p3 = (p[:, None, :] for p in (before, points, after, second))
    curve = 2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3
    return (curve / 2).reshape(-1, 2)


def _stroke(layer: str, points: Points, width: float) -> list[Part]:
    """A polyline of the given width, with round joints and ends."""
    parts = []
    for start, stop in pairwise(points):
        along = stop - start
        normal = np.array([-along[1], along[0]]) * (width / 2 / max(np.hypot(*along), 1e-9))
        parts.append(Part(layer, np.stack([start + normal, stop + normal, stop - normal, start - normal])))
    return parts + [Part(layer, _ellipse(x, y, width / 2, width / 2)) for x, y in points]


def _both(points: Points) -> list[Part]:
    """A part of the object that has the second colour."""
    return [Part("body", points), Part("accent", points)]


def _star(rng: np.random.Generator) -> list[Part]:
    inner = rng.uniform(0.42, 0.54)
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.0, inner)
    outline = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
    parts = [Part("body", outline)]
    if rng.random() < 0.5:
        parts.append(Part("accent", outline * rng.uniform(0.45, 0.7)))
    return parts


def _heart(rng: np.random.Generator) -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    y = -(13 * np.cos(t) - rng.uniform(5, 6.5) * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 15
    outline = np.stack([16 * np.sin(t) ** 3 / 16, y], axis=1)
    parts = [Part("body", outline)]
    if rng.random() < 0.4:
        parts.append(Part("accent", outline * rng.uniform(0.45, 0.7)))
    return parts


def _moon(rng: np.random.Generator) -> list[Part]:
    bite = rng.uniform(0.45, 0.6)
    parts = [Part("body", _ellipse(0, 0, 1, 1))]
    for _ in range(rng.integers(0, 6)):
        angle, radius = rng.uniform(0.6 * np.pi, 1.4 * np.pi), rng.uniform(0.05, 0.11)
        parts.append(Part("accent", _ellipse(0.75 * np.cos(angle), 0.75 * np.sin(angle), radius, radius)))
    return [*parts, Part("hole", _ellipse(bite, 0, rng.uniform(0.78, 0.86), 0.84))]


def _gear(rng: np.random.Generator) -> list[Part]:
    teeth, root = int(rng.integers(8, 13)), rng.uniform(0.72, 0.82)
    step = 2 * np.pi / teeth
    offsets, radii = np.array([-0.30, -0.20, 0.20, 0.30]) * step, np.array([root, 1, 1, root])
    angles = (np.arange(teeth)[:, None] * step + offsets).ravel()
    outline = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.tile(radii, teeth)[:, None]
    hub, bore = rng.uniform(0.42, 0.58), rng.uniform(0.2, 0.34)
    parts = [Part("body", outline)]
    if rng.random() < 0.7:
        parts.append(Part("accent", _ellipse(0, 0, hub, hub)))
    return [*parts, Part("hole", _ellipse(0, 0, bore, bore))]


def _leaf(rng: np.random.Generator) -> list[Part]:
    t = np.linspace(0, 1, 24)
    width = rng.uniform(0.45, 0.65) * np.sin(np.pi * t ** rng.uniform(0.65, 0.9)) ** 0.9
    width = width * (1 + rng.choice([0.0, 0.12]) * (np.arange(24) % 2))  # some leaves are serrated
    y = 1.6 * t - 0.95
    bend = rng.uniform(-0.2, 0.2) * (t - 0.5) ** 2 * 4
    outline = np.concatenate([np.stack([bend + width, -y], 1), np.stack([bend - width, -y], 1)[::-1]])
    parts = [Part("body", outline), *_stroke("body", _points((bend[0], 0.8), (bend[0] + 0.08, 1.15)), 0.1)]
    parts += _stroke("ink", np.stack([bend, -y], 1)[::3], 0.05)
    for i in range(4, 20, 4):
        for side in (-1, 1):
            tip = (bend[i] + side * 0.8 * width[i], -y[i] - 0.22)
            parts += _stroke("ink", _points((bend[i], -y[i]), tip), 0.03)
    return parts


def _mushroom(rng: np.random.Generator) -> list[Part]:
    foot, neck, dome = rng.uniform(0.26, 0.36), rng.uniform(0.2, 0.28), rng.uniform(0.85, 1.1)
    stem = _smooth(_points((-neck, 0), (neck, 0), (foot, 0.75), (foot * 0.8, 0.95), (-foot * 0.8, 0.95), (-foot, 0.75)))
    cap = np.concatenate([_ellipse(0, 0.1, 1, dome, 180, 360), _ellipse(0, 0.1, 1, 0.2, 0, 180)])
    parts = [*_both(stem), Part("ink", _ellipse(0, 0.2, 0.6, 0.14)), Part("body", cap)]
    for _ in range(rng.integers(0, 8)):
        angle, distance, radius = rng.uniform(200, 340), rng.uniform(0.2, 0.8), rng.uniform(0.07, 0.16)
        x, y = distance * np.cos(np.radians(angle)), distance * dome * np.sin(np.radians(angle))
        parts.append(Part("accent", _ellipse(x, y, radius, radius * 0.85)))
    return parts


def _key(rng: np.random.Generator) -> list[Part]:
    bow, width, bit = rng.uniform(0.42, 0.5), rng.uniform(0.17, 0.24), rng.uniform(0.24, 0.36)
    parts = [Part("body", _ellipse(-0.6, 0, bow, bow * rng.uniform(0.9, 1.2)))]
    parts.append(Part("accent", _ellipse(-0.6, 0, bow * 0.8, bow * 0.8)))
    parts += _stroke("body", _points((-0.3, 0), (1.0, 0)), width)
    for x in np.linspace(0.5, 0.92, int(rng.integers(2, 4))):
        parts.append(Part("body", _points((x - 0.08, 0), (x + 0.08, 0), (x + 0.08, bit + 0.1), (x - 0.08, bit + 0.1))))
    return [*parts, Part("hole", _ellipse(-0.62, 0, bow * 0.5, bow * 0.5))]


def _fish(rng: np.random.Generator) -> list[Part]:
    height, tail = rng.uniform(0.38, 0.55), rng.uniform(0.35, 0.5)
    body = _smooth(
        _points(
            (-0.9, 0),
            (-0.55, -0.75 * height),
            (0, -height),
            (0.55, -0.22),
            (0.55, 0.22),
            (0, height),
            (-0.55, 0.75 * height),
        )
    )
    fin = _points((-0.3, -0.7 * height), (0.1, -height - rng.uniform(0.15, 0.35)), (0.4, -0.4 * height))
    parts = [*_both(fin), *_both(_points((0.45, 0), (1.0, -tail), (0.85, 0), (1.0, tail))), Part("body", body)]
    parts += _both(_points((-0.1, 0.6 * height), (0.2, height + rng.uniform(0.05, 0.2)), (0.3, 0.5 * height)))
    parts += _stroke("ink", _ellipse(-0.55, 0, 0.2, 0.7 * height, -60, 60)[::4], 0.035)
    parts += _stroke("ink", _points((-0.88, 0.06), (-0.7, 0.1)), 0.03)
    return [*parts, Part("accent", _ellipse(-0.62, -0.12, 0.1, 0.1)), Part("ink", _ellipse(-0.63, -0.12, 0.05, 0.05))]


def _umbrella(rng: np.random.Generator) -> list[Part]:
    panels, dome = int(rng.integers(4, 7)), rng.uniform(0.8, 1.0)
    edges = np.linspace(-1, 1, panels + 1)
    scallops = [
        _ellipse((a + b) / 2, 0, (b - a) / 2, 0.13, 0, -180)[::4]
        for a, b in zip(edges[::-1][1:], edges[::-1][:-1], strict=True)
    ]
    canopy = np.concatenate([_ellipse(0, 0, 1, dome, 180, 360), *scallops])
    shaft = np.concatenate([_points((0, -0.2), (0, 0.75)), _ellipse(0.17, 0.75, 0.17, 0.18, 180, 10)[::5]])
    parts = _stroke("body", shaft, 0.11) + _stroke("accent", shaft, 0.11)
    parts += [Part("body", canopy), *_stroke("body", _points((0, -dome), (0, -dome - 0.12)), 0.07)]
    for edge in edges[1:-1]:
        parts += _stroke("ink", _points((0, -dome), (edge * 0.75, -dome * 0.5), (edge, 0)), 0.03)
    if rng.random() < 0.5:
        a, b = edges[1:3]
        parts.insert(
            -1, Part("accent", _points((0, -dome), (a * 0.75, -dome * 0.5), (a, 0), (b, 0), (b * 0.75, -dome * 0.5)))
        )
    return parts


def _house(rng: np.random.Generator) -> list[Part]:
    wall, ridge, top = rng.uniform(0.65, 0.85), rng.uniform(-1.05, -0.8), rng.uniform(-0.25, -0.1)
    chimney = rng.choice([-1, 1]) * rng.uniform(0.35, 0.5)
    roof = _points((-wall - 0.18, top), (0, ridge), (wall + 0.18, top))
    parts = [Part("body", _rectangle(chimney, (ridge + top) / 2 - 0.1, 0.11, 0.38))]
    parts += [Part("body", _rectangle(0, (top + 0.85) / 2, wall, (0.85 - top) / 2)), *_both(roof)]
    door = rng.uniform(-0.3, 0.3)
    parts.append(Part("ink", _rectangle(door, 0.58, 0.14, 0.28)))
    for x in (-0.42, 0.42):
        if abs(x - door) > 0.3:
            parts += [Part("accent", _rectangle(x, 0.2, 0.17, 0.17)), Part("ink", _rectangle(x, 0.2, 0.12, 0.12))]
    return parts


def _rectangle(x: float, y: float, half_width: float, half_height: float) -> Points:
    return _points(
        (x - half_width, y - half_height),
        (x + half_width, y - half_height),
        (x + half_width, y + half_height),
        (x - half_width, y + half_height),
    )


def _cactus(rng: np.random.Generator) -> list[Part]:
    trunk, arm = rng.uniform(0.42, 0.54), rng.uniform(0.24, 0.32)
    top, bottom = rng.uniform(-0.95, -0.75), 0.6
    parts = _stroke("body", _points((0, top), (0, bottom)), trunk)
    for side in (-1, 1):
        elbow, height, reach = rng.uniform(-0.15, 0.3), rng.uniform(0.25, 0.5), rng.uniform(0.55, 0.7) * side
        joint = _smooth(_points((0, elbow), (reach * 0.8, elbow), (reach, elbow - 0.15), (reach, elbow - height)))[:19]
        parts += _stroke("body", joint, arm)
    for x in (-0.12, 0.0, 0.12):
        parts += _stroke("ink", _points((x, top + 0.05), (x, bottom)), 0.03)
    pot = rng.uniform(0.36, 0.48)
    return parts + _both(_points((-pot, 0.5), (pot, 0.5), (pot * 0.75, 1.05), (-pot * 0.75, 1.05)))


def _mug(rng: np.random.Generator) -> list[Part]:
    height, taper, ring = rng.uniform(0.65, 0.9), rng.uniform(0.85, 1.05), rng.uniform(0.36, 0.46)
    base = 0.62 * taper
    parts = [
        Part("body", _ellipse(0.6, 0.05, ring, ring * 1.25)),
        Part("hole", _ellipse(0.6, 0.05, ring - 0.16, ring * 1.25 - 0.16)),
    ]
    wall = np.concatenate(
        [_points((-0.62, -height), (0.62, -height), (base, height)), _ellipse(0, height, base, 0.14, 0, 180)]
    )
    parts += [Part("body", wall), Part("body", _ellipse(0, -height, 0.62, 0.17))]
    if rng.random() < 0.5:
        parts.append(Part("accent", _rectangle(0, rng.uniform(-0.2, 0.3), 0.62, rng.uniform(0.08, 0.2))))
    return [*parts, Part("accent", _ellipse(0, -height, 0.62, 0.17)), Part("ink", _ellipse(0, -height, 0.54, 0.125))]


SILHOUETTES: dict[str, Callable[[np.random.Generator], list[Part]]] = {
    "cactus": _cactus,
    "fish": _fish,
    "gear": _gear,
    "heart": _heart,
    "house": _house,
    "key": _key,
    "leaf": _leaf,
    "moon": _moon,
    "mug": _mug,
    "mushroom": _mushroom,
    "star": _star,
    "umbrella": _umbrella,
}


def distractor(rng: np.random.Generator) -> list[Part]:
    """A shape of no class: a polygon, a blob, a slab, a disc, an arc or a cross."""
    kind = rng.integers(6)
    if kind == 0:
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
        return [Part("body", np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.6, 1, (len(angles), 1)))]
    if kind == 1:
        angles = np.arange(7) * 2 * np.pi / 7
        return [Part("body", _smooth(np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.45, 1, (7, 1))))]
    if kind == 2:
        return [Part("body", _rectangle(0, 0, 1, rng.uniform(0.15, 0.9)))]
    if kind == 3:
        return [Part("body", _ellipse(0, 0, 1, rng.uniform(0.5, 1)))]
    if kind == 4:
        return _stroke("body", _ellipse(0, 0, 0.9, 0.9, 0, rng.uniform(100, 250))[::3], rng.uniform(0.15, 0.35))
    arm = rng.uniform(0.15, 0.35)
    return [Part("body", _rectangle(0, 0, 1, arm)), Part("body", _rectangle(0, 0, arm, rng.uniform(0.6, 1)))]
