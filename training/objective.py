"""What the stream is trained for, as a module whose forward pass is the training step's.

    cross_entropy   CE(CA(x), y)                                                       needs labels
    distill         KL(GAP(x) || CA(x))                                                needs none
    masked_distill  KL(GAP(x) || CA(x)) + CE(CA(x * r), argmax GAP(x))                 needs none
    mass_fidelity   KL(GAP(x) || CA(x)) + KL(GAP(x) || CA(x_k)) + sum_e fidelity(e)    needs none

GAP(x) are the logits of the same network under global average pooling, r a random soft mask, x_k one of the masked
views of mass fidelity. Where the logits are sigmoids' (several labels per image, or a single logit), BCE takes the
place of CE, the teacher's probabilities that of its argmax, and the binary KL that of KL. A regression has the squared
error to the teacher in the place of them all.

Mass fidelity trains the model's evidence blocks e: the mass that a mask m_k keeps shall predict how much of the
prediction survives the masked view x_k,

    fidelity(e) = mean_k BCE(r_k, sigmoid(alpha(x) sum_p e(p) m_k(p) - beta(x)))
    r_k         = min(p_c(x_k) / p_c(x), 1)              for the memory; c is the class predicted for x
                  exp(-KL(GAP(x) || GAP(x_k)))           for the constant query

with log alpha and beta linear in what is known of x, trained along and thrown away. Every tenth photo is kept out of
it, and tells how well the mass predicts.
"""

import math
import zlib
from collections.abc import Sequence

import torch
from castream.data.masks import draw_backgrounds, draw_masks, make_backgrounds, scale_to_unit, show_masked
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms

ENTROPY_IMAGES = 8  # of a batch, whose attention's entropy is taken: of all it costs more than the optimiser's step

FIDELITY_TARGETS = {"memory": 0, "constant": 1}  # which survival each evidence block predicts
KEPT_OUT = 10  # every which photo the evidence blocks do not learn from

Features = tuple[tuple[torch.Tensor, ...], torch.Tensor | None]


class Objective(nn.Module):
    """A model together with the loss it is trained on.

    Args:
        model: a CAStreamForImageClassification.
        mean, std: of the pixels in [0, 1], per channel, as the image processor normalises.
        loss: `"cross_entropy"`, `"distill"`, `"masked_distill"` or `"mass_fidelity"`.
        pooling: that is trained, `"ca"`, or the source's own, `"source"` or `"gap"`.
        label_smoothing: of `cross_entropy`.
        mask_kinds, mask_backgrounds: of `mass_fidelity`'s masked views, as `castream.data.masks` names them.

    Raises:
        ValueError: on a loss that needs classes for a regression, or mass fidelity for a model without evidence blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: list[float],
        std: list[float],
        loss: str = "cross_entropy",
        pooling: str = "ca",
        label_smoothing: float = 0.0,
        mask_kinds: Sequence[str] = (),
        mask_backgrounds: Sequence[str] = ("black",),
    ):
        super().__init__()
        self.mask_kinds, self.mask_backgrounds = list(mask_kinds), list(mask_backgrounds)
        self.model, self.loss, self.pooling, self.label_smoothing = model, loss, pooling, label_smoothing
        self.regression = model.config.problem_type == "regression"
        self.sigmoid = model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1
        if self.regression and loss in ("cross_entropy", "mass_fidelity"):
            raise ValueError(f"objective={loss} needs classes, and the model is a regression: use distill.")
        if loss == "mass_fidelity" and not model.config.evidence_queries:
            raise ValueError("objective=mass_fidelity trains evidence blocks: set evidence_queries, e.g. to memory.")
        self.surrogates = nn.ModuleDict()  # of mass fidelity, one per evidence block; no part of the model
        if loss == "mass_fidelity":
            for query in model.evidence:
                self.surrogates[query] = Surrogate(model.config.evidence_channels[-1])
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def uses_masks(self) -> bool:
        """Whether the loss needs the features of a masked view, too."""
        return self.loss in ("masked_distill", "mass_fidelity")

    @property
    def uniform_loss(self) -> float:
        """Per image, at most that of uniform probabilities; infinite for a regression, which has no such bound."""
        if self.regression:
            return math.inf
        uniform = math.log(2 if self.sigmoid else self.model.config.num_labels) * (2 if self.uses_masks else 1)
        return uniform + math.log(2) * len(self.surrogates)

    def normalize(self, images: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """Images as the network takes them: masked, normalised, channels last, which convolutions prefer.

        A CPU goes image by image: what lies between then stays in its cache, and the only fresh memory is the
        result's, whose pages cost more than the arithmetic. The dtype is the one that autocast, if it is on, would
        convert the pixels to anyway.

        Args:
            images: uint8 (batch_size, 3, height, width); fastest where they are channels last already.
            masks: (batch_size, 1, height, width) in [0, 1], for the pixels before they are normalised.
        """
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.mean.dtype
        num_channels, width = images.shape[1], images.shape[3]
        rows = images.permute(0, 2, 3, 1).flatten(2)  # (batch, height, width * channels): no short loops over channels
        mean, std = (value.flatten().repeat(width) for value in (self.mean, self.std))
        normalized = torch.empty_like(rows, dtype=dtype)
        step = 1 if kind == "cpu" else max(1, len(images))
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            pixels = rows[part].to(self.mean.dtype).div_(255)
            if masks is not None:
                pixels.mul_(masks[part, 0].repeat_interleave(num_channels, dim=-1))
            normalized[part] = pixels.sub_(mean).div_(std)
        return normalized.unflatten(2, (width, num_channels)).permute(0, 3, 1, 2)

    def extract(self, batch: dict) -> dict[str, Features]:
        """The backbone's part of the step: features of the view and, where the loss asks for it, of its masked twin.

        Args:
            batch: `images` uint8 (batch_size, 3, height, width), `noise` (batch_size, rows, columns), and for mass
                fidelity `seed` (batch_size,).
        """
        if self.loss == "mass_fidelity":
            return self._extract_fidelity(batch)
        images, features = batch["images"], {"view": self.extract_view(batch)}
        if self.uses_masks:
            masks = random_masks(batch["noise"].float(), features["view"][0][-1].shape[2:], images.shape[2:])
            features["masked"] = self._run_backbone(self.normalize(images, masks))
        return features

    def extract_view(self, batch: dict) -> Features:
        """The backbone's part of the unmasked view alone; `batch` as `extract` takes it."""
        return self._run_backbone(self.normalize(batch["images"]))

    def _run_backbone(self, pixel_values: torch.Tensor) -> Features:
        castream, frozen = self.model.castream, self.model.config.freeze_backbone
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen), castream.folding():
            return castream.extract_features(pixel_values)

    @torch.no_grad()
    def _extract_fidelity(self, batch: dict) -> dict[str, Features]:
        """Features of the view and of one of its masked views, by the sample's seed; and of all masked views the masks,
        at the resolution of the evidence map, and what survives of the prediction, (batch_size, 2, num_masks): in p and
        in KL."""
        pixel_values = self.normalize(batch["images"])
        view = self._run_backbone(pixel_values)
        maps = self.model.castream.evidence_features(view[0])
        clean = self._teacher(view)
        masks = draw_masks(batch["seed"], self._saliency(maps[-1], clean), self.mask_kinds, pixel_values.shape[2:])
        backgrounds = make_backgrounds(pixel_values, self.mask_backgrounds, self.mean, self.std)
        chosen = draw_backgrounds(batch["seed"], len(self.mask_kinds), self.mask_backgrounds)
        survival, kept_view = [], None
        which = batch["seed"].to(pixel_values.device) % len(self.mask_kinds)
        for number in range(len(self.mask_kinds)):
            features = self._run_backbone(show_masked(pixel_values, masks[:, number], backgrounds, chosen[:, number]))
            features_of_stream = features[0][-len(self.model.castream.stream.blocks) :], features[1]
            kept_view = _replace_items(kept_view, features_of_stream, which == number)
            survival.append(self._survival(clean, self._teacher(features)))
        kept = F.adaptive_avg_pool2d(masks, maps[0].shape[2:])
        return {"view": view, "masked": kept_view, "fidelity": ((kept, torch.stack(survival, dim=2)), None)}

    def _teacher(self, features: Features) -> torch.Tensor:
        """The source classifier's logits, float32."""
        with torch.autocast(self.mean.device.type, enabled=False):
            feature_maps, cls_token = features
            cls_token = None if cls_token is None else cls_token.float()
            pooled, _ = self.model.castream.pool_features((feature_maps[-1].float(),), "source")
            return self.model.classify(pooled, cls_token).float()

    def _saliency(self, feature_map: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Where features point like the predicted class's row, scaled to [0, 1]; their length where rows are no such
        directions."""
        feature_map, weight = feature_map.float(), getattr(self.model.classifier, "weight", None)
        length = feature_map.norm(dim=1)
        if weight is None or weight.shape[1] % feature_map.shape[1]:
            return scale_to_unit(length)
        direction = weight[logits.argmax(-1), -feature_map.shape[1] :].float()
        return scale_to_unit((torch.einsum("bk,bkhw->bhw", direction, feature_map) / length.clamp(min=1e-12)).relu())

    def _survival(self, clean: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """(batch_size, 2): of the predicted class's probability, and of the prediction as a whole, each in [0, 1]."""
        before, after = self.model.probabilities(clean), self.model.probabilities(masked)
        predicted = before.argmax(-1, keepdim=True)
        share = (after.gather(1, predicted) / before.gather(1, predicted)).squeeze(1).clamp(max=1)
        return torch.stack([share, torch.exp(-self._divergences(clean, masked))], dim=1)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Loss of a batch, summed over its images, and what to log.

        Args:
            batch: what `extract` takes, or its result as `features`; `labels`: ids (batch_size,), or probabilities
                (batch_size, num_labels), for `cross_entropy`, and for the accuracy.

        Returns:
            `loss`, and with labels `accuracy` (top-1 hits), as sums over the batch; `entropy` (num_blocks,): of the
            attention, relative to the uniform one, in [0, 1] per image, summed over the batch as if all images had
            the mean of the first ENTROPY_IMAGES; `fidelity` (num_evidence_blocks, 4): of the masks of photos kept out
            of mass fidelity, what `explained_variance` takes.
        """
        features = batch["features"] if "features" in batch else self.extract(batch)
        logits, attention_maps = self._logits(features["view"], self.pooling)
        labels = batch.get("labels")
        if self.loss == "cross_entropy":
            loss = self._supervised(logits, labels)
        else:
            with torch.no_grad():
                teacher, _ = self._logits(features["view"], "source")
            loss = self._divergence(teacher, logits)
            if self.loss == "mass_fidelity":
                masked, _ = self._logits(features["masked"], self.pooling)
                fidelity, predicted = self._fidelity(features, teacher, kept_out(batch.get("keys", []), len(logits)))
                loss = loss + self._divergence(teacher, masked) + fidelity
            elif self.uses_masks:
                masked, _ = self._logits(features["masked"], self.pooling)
                loss = loss + self._confirmed(teacher, masked)
        if not attention_maps:  # pooling="source" trains what lies around the stream, and does not run it
            _, attention_maps = self.model.castream.stream(features["view"][0])
        first = tuple(attention[:ENTROPY_IMAGES] for attention in attention_maps)
        entropy = attention_entropy(first) * (len(logits) / len(first[0]))
        logged = {"loss": loss, "entropy": entropy} | self._accuracy(logits, labels)
        return logged | ({"fidelity": predicted} if self.loss == "mass_fidelity" else {})

    def _fidelity(
        self, features: dict[str, Features], teacher: torch.Tensor, kept_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of the evidence blocks, and what `explained_variance` takes, of the photos `kept_out` of it."""
        (feature_maps, cls_token), ((masks, survival), _) = features["view"], features["fidelity"]
        maps = self.model.castream.evidence_features(feature_maps)
        known = describe_predictions(maps[-1].mean((2, 3)), self.model.probabilities(teacher))
        kept_out = kept_out.to(masks.device)
        loss, predicted = 0, []
        for query, surrogate in self.surrogates.items():
            scores = self.model.evidence_scores(query, maps, cls_token)
            evidence = scores.flatten(1).softmax(-1).view_as(scores)
            logits = surrogate((evidence[:, None] * masks).sum((2, 3)), known)
            survived = survival[:, FIDELITY_TARGETS[query]]
            losses = F.binary_cross_entropy_with_logits(logits, survived, reduction="none").mean(1)
            loss = loss + losses[~kept_out].sum()
            survived, error = survived[kept_out], (survived - logits.detach().sigmoid())[kept_out]
            count = torch.tensor(float(survived.numel()), device=survived.device)
            predicted.append(torch.stack([count, survived.sum(), survived.square().sum(), error.square().sum()]))
        return loss, torch.stack(predicted)

    def _logits(self, features: Features, pooling: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        feature_maps, cls_token = features
        pooled, attention_maps = self.model.castream.pool_features(feature_maps, pooling)
        return self.model.classify(pooled, cls_token).float(), attention_maps

    def _supervised(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.sigmoid:
            return _binary_cross_entropy(logits, self._probabilities(target))
        return F.cross_entropy(logits, target, reduction="sum", label_smoothing=self.label_smoothing)

    def _divergence(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """Of the student's logits from the teacher's, summed over the batch."""
        if not (self.regression or self.sigmoid):
            return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
        return self._divergences(teacher, student).sum()

    def _divergences(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """Of the student's logits from the teacher's, (batch_size,)."""
        if self.regression:
            return F.mse_loss(student, teacher, reduction="none").mean(-1)
        options = {"reduction": "none", "log_target": True}
        if not self.sigmoid:
            return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), **options).sum(-1)
        both = [F.kl_div(F.logsigmoid(sign * student), F.logsigmoid(sign * teacher), **options) for sign in (1, -1)]
        return sum(both).mean(-1)

    def _confirmed(self, teacher: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Loss of the masked view's logits against what the teacher says of the whole one."""
        if self.regression:
            return self._divergence(teacher, masked)
        return self._supervised(masked, teacher.sigmoid() if self.sigmoid else teacher.argmax(-1))

    def _probabilities(self, target: torch.Tensor) -> torch.Tensor:
        """Of each sigmoid, (batch_size, num_labels); class ids become one-hot, those of a single logit stay 0 or 1."""
        if target.ndim == 1:
            num_labels = self.model.config.num_labels
            target = target[:, None] if num_labels == 1 else F.one_hot(target, num_labels)
        return target.float()

    def _accuracy(self, logits: torch.Tensor, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Number of images whose most probable class is a label; a mixed image counts as its stronger one."""
        if labels is None:
            return {}
        if logits.shape[-1] == 1:
            hits = (logits[:, 0] > 0) == (labels.flatten() > 0.5)
        elif labels.ndim == 1:
            hits = logits.argmax(-1) == labels
        else:
            strongest = labels.amax(-1, keepdim=True)
            hits = labels.gather(1, logits.argmax(-1, keepdim=True)) >= strongest.clamp(min=1e-6)
        return {"accuracy": hits.sum().float()}


def _binary_cross_entropy(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Mean over labels, summed over images."""
    return F.binary_cross_entropy_with_logits(logits, probabilities, reduction="none").mean(-1).sum()


def _replace_items(features: Features | None, others: Features, chosen: torch.Tensor) -> Features:
    """Features with those of other images at the `chosen` places, (batch_size,) bool; `others` where there are none."""
    if features is None:
        return others
    (maps, cls_token), (other_maps, other_cls_token) = features, others
    places = chosen.nonzero().flatten()
    maps = tuple(one.index_copy(0, places, other[places]) for one, other in zip(maps, other_maps, strict=True))
    return maps, None if cls_token is None else cls_token.index_copy(0, places, other_cls_token[places])


class Surrogate(nn.Module):
    """How much of a prediction survives, as a logit, by the evidence that a mask keeps: alpha(x) mass - beta(x).

    Args:
        num_channels: of the pooled vector.
    """

    def __init__(self, num_channels: int):
        super().__init__()
        self.linear = nn.Linear(num_channels + 3, 2)  # log alpha and beta
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(torch.tensor([1.5, 2.0]))  # half of the evidence: even odds, about

    def forward(self, mass: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """mass (batch_size, num_masks) in [0, 1], known (batch_size, num_channels + 3) -> (batch_size, num_masks)."""
        log_alpha, beta = self.linear(known).unbind(1)
        return log_alpha.exp()[:, None] * mass - beta[:, None]


def kept_out(keys: Sequence[str], num_images: int) -> torch.Tensor:
    """Which images of a batch mass fidelity does not train on, by the keys of their photos: (num_images,), bool."""
    chosen = [zlib.crc32(key.encode()) % KEPT_OUT == 0 for key in keys]
    return torch.tensor(chosen or [False] * num_images)


def explained_variance(count: float, total: float, squares: float, errors: float) -> float:
    """R2 of predictions: 1 - sum (y - y')^2 / sum (y - mean y)^2; NaN where the values do not vary.

    Args:
        count, total, squares: number, sum and sum of the squares of the values y; errors: sum of (y - y')^2.
    """
    variance = squares - total**2 / count if count else 0.0
    return 1 - errors / variance if variance > 0 else math.nan


def describe_predictions(pooled: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """What is known of an unmasked image: its pooled vector's direction and length, confidence and entropy.

    Args:
        pooled: (batch_size, num_channels); probabilities: (batch_size, num_labels).

    Returns:
        (batch_size, num_channels + 3).
    """
    length = pooled.norm(dim=1, keepdim=True).clamp(min=1e-12)
    confidence = probabilities.amax(-1, keepdim=True)
    entropy = torch.special.entr(probabilities).sum(-1, keepdim=True)
    return torch.cat([pooled / length, length / pooled.shape[1] ** 0.5, confidence, entropy], dim=1)


def random_masks(noise: torch.Tensor, map_size: tuple[int, int], image_size: tuple[int, int]) -> torch.Tensor:
    """Random soft masks in [0, 1]: noise, bicubic to the feature maps' size, ReLU, min-max, bilinear to the image's.

    Args:
        noise: (batch_size, rows, columns).

    Returns:
        (batch_size, 1, *image_size).
    """
    maps = scale_to_unit(F.interpolate(noise[:, None], map_size, mode="bicubic", align_corners=False).relu())
    return F.interpolate(maps, image_size, mode="bilinear", align_corners=False)


def attention_entropy(attention_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Entropy of each block's attention over ln(positions), so 1 is uniform; summed over the batch, mean over heads.

    Args:
        attention_maps: one per block, (batch_size, num_heads, height_l, width_l).

    Returns:
        (num_blocks,), float32, without gradient.
    """
    entropies = []
    for attention in attention_maps:
        flat = attention.detach().float().flatten(2)
        entropy = torch.special.entr(flat).sum(-1).mean(1)
        entropies.append(entropy.sum() / torch.tensor(float(max(2, flat.shape[-1]))).log())
    return torch.stack(entropies)


class Mixer:
    """Mixes the images and labels of a batch with those of partners, by mixup or cutmix, or one of them at random.

    Args:
        mixup, cutmix: their alphas; 0: not that one.
        num_labels: classes.
        seed, rank: of the run and of this process; each process mixes in its own way.
    """

    def __init__(self, mixup: float, cutmix: float, num_labels: int, seed: int, rank: int):
        kinds = ((transforms.MixUp, mixup), (transforms.CutMix, cutmix))
        self.transforms = [kind(alpha=alpha, num_classes=num_labels) for kind, alpha in kinds if alpha]
        self.seed, self.rank = seed, rank

    def __call__(self, batch: dict, step: int, part: int) -> dict:
        """Mix a batch with uint8 `images`; `labels` become probabilities (batch_size, num_labels).

        Args:
            step, part: the optimiser step and the batch's place in it, which seed the mixing.
        """
        if not self.transforms:
            return batch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, self.rank, step, part)) % 2**63)
            transform = self.transforms[int(torch.randint(len(self.transforms), ()))]
            images, labels = transform(batch["images"].float() / 255, batch["labels"])
        return batch | {"images": (images * 255).round().to(torch.uint8), "labels": labels}
