"""Weights and inputs of the reference numbers, as functions of a name (see README.md in this folder).

Every draw is float32 standard normal in C order, seeded with the crc32 of the name's bytes, and every operation is done
in float32, so that all machines regenerate the same bits.
"""

import math
import zlib

import numpy as np

MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)
STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)


def _standard_normal(key: bytes, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(zlib.crc32(key))).standard_normal(tuple(shape), dtype=np.float32)


def formula_array(name: str, shape: tuple[int, ...], conv_gain: float = 1.0) -> np.ndarray:
    """Value of the state_dict entry `name`, the reference's name, not ours.

    `conv_gain` multiplies 4-dimensional weights only: 1.68 for EfficientNet, whose signal dies at 1.0, else 1.0.
    """
    shape, kind, f32 = tuple(shape), name.split(".")[-1], np.float32
    if kind == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    noise = _standard_normal(name.encode(), shape)
    if kind == "cls_token":
        return f32(1) + noise
    if kind == "layer_scale":
        return f32(0.1) + f32(0.01) * noise
    if kind == "running_var":
        return f32(1) + f32(0.1) * np.abs(noise)
    if kind in ("running_mean", "bias"):
        return f32(0.1) * noise
    if kind == "weight" and len(shape) >= 2:
        gain = conv_gain if len(shape) == 4 else 1.0
        return noise * f32(gain / math.sqrt(math.prod(shape[1:])))
    if kind == "weight":
        return f32(1) + f32(0.1) * noise
    raise KeyError(name)


def pixels(case: str, shape: tuple[int, ...]) -> np.ndarray:
    """Network input of a model case, used as it is, without normalisation."""
    return _standard_normal(b"pixels:" + case.encode(), shape)


def images(case: str, n: int = 4, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Images of a metrics case, (n, 3, size, size): in [0, 1], and normalised by ImageNet's mean and std."""
    noise = pixels(case, (n, 3, size, size))
    image = np.clip(np.float32(0.5) + np.float32(0.25) * noise, np.float32(0), np.float32(1))
    return image, (image - MEAN) / STD


def saliency(case: str, n: int = 4, size: int = 64) -> np.ndarray:
    """Synthetic saliency maps (n, size, size) in [0, 1] without a single tie."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(b"saliency:" + case.encode())))
    ranks = np.stack([rng.permutation(size * size).reshape(size, size) for _ in range(n)])
    return ranks.astype(np.float32) / np.float32(size * size - 1)
