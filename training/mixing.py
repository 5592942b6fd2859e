"""Mixup and cutmix: batches whose images and labels are mixed with those of a partner."""

import torch
from torchvision.transforms import v2 as transforms

from .arguments import TrainingArguments


class Mixer:
    """Mixes a batch as `mixup` and `cutmix` say; with both, one of them, chosen at random.

    Args:
        args: `mixup` and `cutmix`, the alphas; `seed`.
        num_labels: classes.
        rank: of this process, which mixes otherwise than the others.
    """

    def __init__(self, args: TrainingArguments, num_labels: int, rank: int):
        kinds = ((transforms.MixUp, args.mixup), (transforms.CutMix, args.cutmix))
        self.transforms = [kind(alpha=alpha, num_classes=num_labels) for kind, alpha in kinds if alpha]
        self.seed, self.rank, self.num_labels = args.seed, rank, num_labels

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
