"""Evidence: a second attention beside the stream, which says what the prediction rests on.

The stream pools; an evidence block explains. It is trained so that the attention that a mask keeps predicts how much of
the prediction survives the mask ("mass fidelity", objective `mass_fidelity` of the training). Symbols and their names:

    F(p)   feature_map   (batch_size, num_channels, height, width), the pooled feature map, p its positions
    u(p)   unit keys     F(p) / ||F(p)||
    n(p)   norms         ||F(p)|| / mean_p ||F(p)||
    g      pooled        (batch_size, num_channels), mean_p F(p)
    z      logits        (batch_size, num_labels), the classifier's, of g
    V      memory        (num_labels, num_channels), the classifier's rows, centred over the classes
    q      query         (batch_size, num_channels)
    e(p)   evidence_map  (batch_size, height, width), sums to 1

    q      = unit(V^T softmax(z / T)) + w_g unit(g) + b + B A unit(g)       query "memory"
    q      = b                                                              query "constant"
    t(p)   = tau unit(q) . u(p) + w_1 n(p) + w_2 log n(p)
    s(p)   = t(p) + w_s mean_{3x3 around p} t                               mean of the positions inside the map
    s'(p)  = bilinear(s)(p) + tau_f unit(q_f) . u_f(p)                      with a finer map F_f before the pooled one
    e      = softmax_p s  (or s')

The memory makes the query the image's own: it gathers the classifier's rows as the prediction weighs them. For a class
c the softmax gives way to c's own row, and the map is that class's. A constant query asks every image the same, which
finds objects rather than evidence.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

_RANK = 64  # of B A, the correction of the query by the pooled vector
_FIRST_SHARPNESS = 5.0  # tau before training: a cosine alone would leave the softmax next to uniform
_SCALAR_GAIN = 20.0  # scalars are kept divided by it: they need steps that much longer than vectors do
_QUERY_STD = 0.02
_TINY = 1e-12  # of lengths that divide
_LEAST_NORM = 1e-6  # of relative norms, before the logarithm


class EvidenceBlock(nn.Module):
    """One evidence map per image, from the pooled feature map and, for a finer one, the feature map before it.

    Args:
        query: `"memory"` or `"constant"`.
        num_channels: of the pooled feature map.
        num_finer_channels: of the feature map before it; None for a map at the pooled one's resolution.
    """

    def __init__(self, query: str, num_channels: int, num_finer_channels: int | None = None):
        super().__init__()
        self.reads_memory, self.has_finer_map = query == "memory", num_finer_channels is not None
        self.bias = nn.Parameter(torch.empty(num_channels))  # b
        self.scalars = nn.ParameterDict({name: nn.Parameter(torch.empty(1)) for name in self._scalar_starts()})
        if self.reads_memory:
            rank = min(_RANK, num_channels)
            self.down = nn.Linear(num_channels, rank, bias=False)  # A
            self.up = nn.Linear(rank, num_channels, bias=False)  # B
        if self.has_finer_map:
            self.finer_query = nn.Parameter(torch.empty(num_finer_channels))  # q_f

    def _scalar_starts(self) -> dict[str, float]:
        """Values of the scalars before training, by name."""
        starts = {"sharpness": _FIRST_SHARPNESS, "norm": 0.0, "log_norm": 0.0, "smoothing": 0.0}
        if self.reads_memory:
            starts |= {"log_temperature": 0.0, "pooled": 0.0}
        return starts | ({"finer_sharpness": 1.0} if self.has_finer_map else {})

    def scalar(self, name: str) -> torch.Tensor:
        """One of tau, w_1, w_2, w_s, T's logarithm, w_g, tau_f."""
        return _SCALAR_GAIN * self.scalars[name]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Before training: the memory's map is the cosine of the predicted classes' rows and the features, the constant
        query's is next to uniform."""
        for name, value in self._scalar_starts().items():
            init.constant_(self.scalars[name], value / _SCALAR_GAIN)
        if self.reads_memory:
            init.zeros_(self.bias)
            init.normal_(self.down.weight, std=self.down.in_features**-0.5)
            init.zeros_(self.up.weight)
        else:
            init.normal_(self.bias, std=_QUERY_STD)
        if self.has_finer_map:
            init.normal_(self.finer_query, std=_QUERY_STD)

    def query(
        self, pooled: torch.Tensor, logits: torch.Tensor, memory: torch.Tensor, target: torch.Tensor | None = None
    ) -> torch.Tensor:
        """q, (batch_size, num_channels); `target` (batch_size,) puts that class's row in the softmax's place."""
        if not self.reads_memory:
            return self.bias.expand_as(pooled)
        if target is None:
            read = (logits * torch.exp(-self.scalar("log_temperature"))).softmax(-1) @ memory
        else:
            read = memory[target]
        direction = unit(pooled)
        correction = self.up(self.down(direction.to(self.down.weight.dtype))).to(direction.dtype)
        return unit(read) + self.scalar("pooled") * direction + self.bias + correction

    def scores(
        self,
        feature_maps: tuple[torch.Tensor, ...],
        logits: torch.Tensor,
        memory: torch.Tensor,
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """s, or s' with a finer map: what the softmax over positions takes.

        Args:
            feature_maps: the finer feature map, where the block reads one, and the pooled one.
            logits: (batch_size, num_labels), the classifier's of the pooled map's mean.
            memory: V, (num_labels, num_channels).
            target: class ids (batch_size,); None: the classes as the prediction weighs them.

        Returns:
            (batch_size, height, width), float32 or better.
        """
        dtype = torch.promote_types(feature_maps[-1].dtype, torch.float32)  # for lengths and a softmax
        feature_map, logits, memory = feature_maps[-1].to(dtype), logits.to(dtype), memory.to(dtype)
        norms = feature_map.norm(dim=1, keepdim=True)
        keys, relative = feature_map / norms.clamp_min(_TINY), norms / norms.mean((2, 3), keepdim=True).clamp_min(_TINY)
        query = unit(self.query(feature_map.mean((2, 3)), logits, memory, target).to(dtype))
        scores = self.scalar("sharpness") * _similarity(query, keys)
        scores = scores + self.scalar("norm") * relative
        scores = scores + self.scalar("log_norm") * relative.clamp_min(_LEAST_NORM).log()
        scores = scores + self.scalar("smoothing") * F.avg_pool2d(scores, 3, 1, 1, count_include_pad=False)
        if self.has_finer_map:
            finer = feature_maps[0].to(dtype)
            scores = _bilinear(scores, finer.shape[2:])
            query = unit(self.finer_query.to(dtype), dim=0).expand(finer.shape[0], -1)
            scores = scores + self.scalar("finer_sharpness") * _similarity(query, unit(finer))
        return scores.squeeze(1)

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """e, (batch_size, height, width), summing to 1 over positions; arguments as of `scores`."""
        scores = self.scores(*args, **kwargs)
        return scores.flatten(1).softmax(-1).view_as(scores)


def unit(vectors: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Vectors scaled to length 1 along an axis; zero stays zero."""
    return vectors / vectors.norm(dim=dim, keepdim=True).clamp_min(_TINY)


def _similarity(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q . u(p): (batch, channels) and (batch, channels, height, width) -> (batch, 1, height, width)."""
    return (query[:, None] @ keys.flatten(2)).unflatten(2, keys.shape[2:])


__all__ = ["EvidenceBlock", "unit"]


def _bilinear(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(batch, 1, *size), as torch's interpolation with align_corners=False.

    By products and sums, since the backward pass of torch's own adds in no fixed order on a GPU: a resumed training
    would not be the uninterrupted one.
    """
    rows, columns = (_shares(*pair, scores) for pair in zip(size, scores.shape[2:], strict=True))
    scores = (rows[:, :, None] * scores[:, :, None]).sum(3)
    return (columns * scores[..., None, :]).sum(-1)


def _shares(wanted: int, given: int, like: torch.Tensor) -> torch.Tensor:
    """(wanted, given): how much each position takes from each of the given ones; rows sum to 1."""
    places, given_places = (torch.arange(count, device=like.device, dtype=like.dtype) for count in (wanted, given))
    places = ((places + 0.5) * given / wanted - 0.5).clamp(0, given - 1)
    return (1 - (places[:, None] - given_places).abs()).clamp_min(0)
