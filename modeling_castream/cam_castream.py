"""The arithmetic of class activation maps: from a feature map and its gradient to channel weights and signed maps.

Pure functions on tensors, one method each; the model is `saliency_castream`'s affair.

    A_k(p)  feature_map  (batch_size, num_channels, height, width), the target layer's map, k channels, p positions
    g_k(p)  gradients    the same shape, d logit_c / d A_k(p)
    w_k     weights      (batch_size, num_channels)
"""

import torch

EPS = 2.2e-16  # of every ratio below: the reference's (numpy's float64 epsilon)


def combine(weights: torch.Tensor, feature_map: torch.Tensor) -> torch.Tensor:
    """The map sum_k w_k A_k: (batch_size, ..., num_channels) and A -> (batch_size, ..., height, width)."""
    return torch.einsum("b...k,bkhw->b...hw", weights, feature_map)


def grad_cam(feature_map: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """w_k = mean_p g_k(p). Source: Grad-CAM, arXiv:1610.02391v4, Eqs. 1-2."""
    return combine(gradients.mean((2, 3)), feature_map)


def cosine_cam(feature_map: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Grad-CAM of the feature map scaled to unit length at each position: w . A(p) / ||A(p)||.

    Grad-CAM's map grows with the length of A(p) whatever A(p) shows; this one compares directions only. Zero where
    A(p) is zero.
    """
    return grad_cam(feature_map, gradients) / feature_map.norm(dim=1).clamp_min(torch.finfo(feature_map.dtype).tiny)


def grad_cam_plus_plus_weights(feature_map: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """w_k = sum_p alpha_k(p) relu(g_k(p)), alpha = g^2 / (2 g^2 + (sum_p A_k) g^3), 0 where g = 0.

    Eq. 19's derivatives are those of exp(logit), whose common factor exp(logit) is left out: it is positive, the same
    for all channels, and gone after min-max. It assumes a logit that is piecewise linear in A.
    Source: Grad-CAM++, arXiv:1710.11063v3, Eqs. 5 and 19.
    """
    squared = gradients.square()
    total = feature_map.sum((2, 3), keepdim=True)
    denominator = 2 * squared + total * squared * gradients + EPS
    alpha = torch.where(gradients == 0, 0, squared / denominator)
    return (alpha * gradients.relu()).sum((2, 3))


def grad_cam_plus_plus(feature_map: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """The map of `grad_cam_plus_plus_weights`."""
    return combine(grad_cam_plus_plus_weights(feature_map, gradients), feature_map)


def hires_cam(feature_map: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """sum_k g_k(p) A_k(p). Source: HiResCAM, arXiv:2011.08891."""
    return (gradients * feature_map).sum(1)


def layer_cam(feature_map: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """sum_k relu(g_k(p)) A_k(p). Source: LayerCAM, doi:10.1109/TIP.2021.3089943."""
    return (gradients.relu() * feature_map).sum(1)


def xgrad_cam(feature_map: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """w_k = sum_p g_k(p) A_k(p) / sum_p A_k(p), 0 for a zero denominator.

    Source: XGrad-CAM, arXiv:2008.02312.
    """
    total = feature_map.sum((2, 3))
    weights = (gradients * feature_map).sum((2, 3)) / torch.where(total == 0, 1, total)
    return combine(torch.where(total == 0, 0, weights), feature_map)


def eigen_cam(feature_map: torch.Tensor) -> torch.Tensor:
    """A's projection on its first right singular vector, positions being rows; not centred, the same for all classes.

    The sign of a singular vector is arbitrary: here the map's sum is not negative. Non-finite items yield NaN.
    Source: Eigen-CAM, arXiv:2008.00299.
    """
    rows = feature_map.flatten(2).transpose(1, 2).double()  # (batch, positions, channels)
    finite = rows.isfinite().all((1, 2), keepdim=True)
    rows = torch.where(finite, rows, 0)
    if rows.shape[1] <= rows.shape[2]:  # the eigenvectors of the smaller one of A A^T and A^T A
        values, vectors = torch.linalg.eigh(rows @ rows.transpose(1, 2))
        projection = vectors[:, :, -1] * values[:, -1:].clamp_min(0).sqrt()
    else:
        vectors = torch.linalg.eigh(rows.transpose(1, 2) @ rows).eigenvectors
        projection = (rows @ vectors[:, :, -1:]).squeeze(2)
    projection = torch.where(projection.sum(1, keepdim=True) < 0, -projection, projection)
    projection = torch.where(finite.squeeze(2), projection, torch.nan)
    return projection.unflatten(1, feature_map.shape[2:]).float()


def attention_terms(direction: torch.Tensor, feature_map: torch.Tensor, attention: torch.Tensor | None) -> torch.Tensor:
    """The terms of logit_c = bias + sum_p a(p) v_c . F(p).

    With layers between pooling and linear classifier, v_c is W_L^T times the gradient at the pooled vector, and the
    terms add up to the logit's linearization there.

    Args:
        direction: v_c = W_L^T w_c, (batch_size, num_channels).
        feature_map: F, the pooled map.
        attention: a, (batch_size, num_heads, height, width), head h weighing the h-th group of channels; None for
            global average pooling's 1 / (height * width).

    Returns:
        (batch_size, height, width); its sum over positions is the logit minus what does not depend on F.
    """
    if attention is None:
        return combine(direction, feature_map) / feature_map[0, 0].numel()
    num_heads = attention.shape[1]
    terms = torch.einsum(
        "bnk,bnkhw->bnhw", direction.unflatten(1, (num_heads, -1)), feature_map.unflatten(1, (num_heads, -1))
    )
    return (attention * terms).sum(1)


def normalize_maps(maps: torch.Tensor) -> torch.Tensor:
    """Min-max scale each map: (map - min) / (max - min + 2.2e-16).

    A flat map, that is one whose range is rounding noise, becomes zero.

    Args:
        maps: (..., height, width), finite.

    Returns:
        The same shape, in [0, 1].
    """
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    noise = 4 * torch.finfo(maps.dtype).eps * torch.maximum(low.abs(), high.abs())
    return torch.where(high - low <= noise, 0, (maps - low) / (high - low + EPS))


__all__ = [
    "EPS",
    "attention_terms",
    "combine",
    "cosine_cam",
    "eigen_cam",
    "grad_cam",
    "grad_cam_plus_plus",
    "grad_cam_plus_plus_weights",
    "hires_cam",
    "layer_cam",
    "normalize_maps",
    "xgrad_cam",
]
