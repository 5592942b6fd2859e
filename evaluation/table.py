"""Which rows the table of an evaluation has."""

from dataclasses import dataclass

from .settings import CONTROL_MAPS, EvaluationSettings


@dataclass(frozen=True)
class Row:
    """A row of the table: whose map, and who scores it.

    Args:
        method: a saliency method, or a control map.
        pooling: of the map, unless `map_pooling` says otherwise.
        control: "" for the plain protocol.
        scoring: who gives the probabilities: a pooling, "gap_temperature", "source_temperature", "ca_norm" or
            "ca_bound".
        map_pooling: of the map, where it is another one's than the row's.
    """

    method: str
    pooling: str
    control: str
    scoring: str
    map_pooling: str | None = None

    @property
    def map_key(self) -> tuple[str, str, bool]:
        """Method, pooling, and whether the area is matched."""
        return self.method, self.map_pooling or self.pooling, "area" in self.control


def table_rows(settings: EvaluationSettings) -> list[Row]:
    """The rows that the settings ask for, in the order of the report."""
    controls, own, rows = settings.controls, settings.own_pooling, []
    for method in (*settings.methods, *(name for name in CONTROL_MAPS if name in controls)):
        for area in ("", "area") if "area" in controls else ("",):
            rows += [Row(method, pooling, area, pooling) for pooling in settings.poolings]
            if "map_only" in controls and method not in CONTROL_MAPS:
                rows.append(Row(method, "ca", "map_only_area" if area else "map_only", own))
        if "temperature" in controls:
            rows.append(Row(method, own, "temperature", f"{own}_temperature"))
        if "norm" in controls:
            rows.append(Row(method, "ca", "norm", "ca_norm"))
        if "pooling_only" in controls and method not in CONTROL_MAPS:
            rows.append(Row(method, "ca", "pooling_only", "ca_norm", map_pooling=own))
        if "bound" in controls:
            rows.append(Row(method, "ca", "bound", "ca_bound"))
    return rows


def reference_map(settings: EvaluationSettings) -> tuple[str, str, bool]:
    """The map whose area the others are matched to, and the method they are compared with: Grad-CAM under GAP, or,
    where the settings lack one or the other, their first."""
    method = "grad_cam" if "grad_cam" in settings.methods else settings.methods[0]
    own = settings.own_pooling
    return method, own if own in settings.poolings else settings.poolings[0], False
