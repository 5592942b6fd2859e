"""What an evaluation does: one dataclass, checked before any image is read."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace

POOLINGS = ("gap", "ca", "source")
STABLE_CHANGES = ("hiding_blur", "blurred_deletion", "random_ties")
PROTOCOLS = ("reference", "stable", *STABLE_CHANGES)
TARGETS = ("label", "predicted", "second")
AUTOCASTS = ("off", "auto", "bf16", "fp16")
CONTROL_MAPS = ("random_map", "center_gaussian", "uniform_map")
CONTROLS = (*CONTROL_MAPS, "temperature", "norm", "bound", "map_only", "pooling_only", "area", "randomization")
PAIRED_CONTROLS = (
    "temperature",
    "norm",
    "bound",
    "map_only",
    "pooling_only",
)  # compare the poolings, so they need both
AVERAGE_CONTROLS = ("norm", "bound", "pooling_only")  # compare CA with an average, so the source must have one
PROBABILITY_METRICS = ("average_drop", "average_gain", "average_increase")
MASKING_METRICS = (*PROBABILITY_METRICS, "kept")
CURVE_METRICS = ("insertion", "deletion")
PERTURBATION_METRICS = ("positive_perturbation", "negative_perturbation")
LOCALIZATION_METRICS = ("mask_share", "pointing_game", "pixel_average_precision")
METRICS = (*MASKING_METRICS, *CURVE_METRICS, *PERTURBATION_METRICS, *LOCALIZATION_METRICS, "sparsity")
PAPER_METRICS = (*PROBABILITY_METRICS, *CURVE_METRICS)


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation. Everything here can change a figure, so everything here is in results.json.

    Args:
        methods: saliency methods of `modeling_castream.explain`.
        poolings: `"ca"` and/or the source's own: `"gap"`, or `"source"`, which it is called where the source averages
            nothing. With both, CA minus the source's own is reported, image by image, as `ca_minus_gap`.
        metrics: names from METRICS; LOCALIZATION_METRICS need examples with a mask or boxes.
        protocol: `"reference"`, the paper's, or `"stable"`; see evaluation/README.md for what differs and by how much.
            The name of one of stable's changes (STABLE_CHANGES) is the reference with that change alone.
        target: explain the `"label"` or the `"predicted"` class; under both poolings it is the class that the first
            of `poolings` predicts, and methods that need no class, such as evidence, are not given one. Examples
            without a label are explained for the predicted class. `"second"`: the class that is predicted if the
            likeliest one is left out, which tells whether a map is the class's own.
        batch_size: images per forward pass.
        controls: names from CONTROLS.
        max_images: stop after this many examples; None for all.
        seed: of the random control map, the shuffled classifier and the intervals.
        autocast: `"off"`, `"bf16"` or `"fp16"`: precision of the backbone's forward passes; `"auto"` is `"bf16"` where
            that is faster on this machine, else `"off"`. The report says how its figures correlate with float32's.
        num_examples: images in examples.png.

    Raises:
        ValueError: on a value outside the ones above.
    """

    methods: tuple[str, ...] = ("grad_cam", "attention_cam", "raw_attention")
    poolings: tuple[str, ...] = ("gap", "ca")
    metrics: tuple[str, ...] = PAPER_METRICS
    protocol: str = "reference"
    target: str = "label"
    batch_size: int = 16
    controls: tuple[str, ...] = ()
    max_images: int | None = None
    seed: int = 0
    autocast: str = "off"
    num_examples: int = 8

    def __post_init__(self):
        from modeling_castream.methods_castream import METHODS  # importing the model's code takes seconds

        for name, allowed in (
            ("methods", tuple(METHODS)),
            ("poolings", POOLINGS),
            ("metrics", METRICS),
            ("controls", CONTROLS),
        ):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)  # a list from the command line becomes a tuple
            unknown = [value for value in values if value not in allowed]
            if unknown or len(set(values)) != len(values):
                raise ValueError(
                    f"{name} must be different names out of {', '.join(allowed)}, got {', '.join(values) or '()'}."
                )
            if not values and name != "controls":
                raise ValueError(f"{name} is empty: name at least one of {', '.join(allowed)}.")
        for name, allowed in (("protocol", PROTOCOLS), ("target", TARGETS), ("autocast", AUTOCASTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name, least in (("batch_size", 1), ("max_images", 1), ("num_examples", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        paired = [name for name in PAIRED_CONTROLS if name in self.controls]
        if {"gap", "source"} <= set(self.poolings):
            raise ValueError("poolings must name the source's own once, got gap and source.")
        if paired and len(self.poolings) != 2:
            raise ValueError(f"controls {', '.join(paired)} compare both poolings, got poolings={self.poolings[0]}.")

    @property
    def own_pooling(self) -> str:
        """What the source's own pooling is called here: `"gap"` or `"source"`."""
        return "source" if "source" in self.poolings else "gap"

    def for_model(self, config, named: Iterable[str] = ()) -> "EvaluationSettings":
        """These settings, for a model whose source averages nothing with what it has: `"source"` in the place of
        `"gap"`, no method that needs a pooling over positions, no control that needs an average.

        Args:
            config: the model's.
            named: settings that stay as they are, since somebody chose them.
        """
        from modeling_castream.methods_castream import METHODS

        if config.source_pooling == "gap":
            return self
        fitting = {
            "poolings": ["source" if name == "gap" else name for name in self.poolings],
            "methods": [name for name in self.methods if not METHODS[name].needs_positions],
            "controls": [name for name in self.controls if name not in AVERAGE_CONTROLS],
        }
        return replace(self, **{name: values for name, values in fitting.items() if name not in named})

    @property
    def block_size(self) -> int:
        """Images evaluated together: a forward pass's, but an eighth of these where each takes a pass a channel, so
        that progress is shown and kept every few minutes. Their masked images fill the forward passes all the same."""
        from modeling_castream.methods_castream import METHODS

        masked = any(METHODS[method].masked_passes for method in self.methods)
        return max(1, self.batch_size // 8) if masked else self.batch_size

    @property
    def localization_metrics(self) -> list[str]:
        """Those of the metrics that need an object, in order."""
        return [name for name in LOCALIZATION_METRICS if name in self.metrics]

    def to_dict(self) -> dict:
        """The settings as JSON holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def names(cls) -> list[str]:
        """Names of the settings, in order."""
        return [field.name for field in fields(cls)]
