"""What panels and dashboards look like in Grafana's JSON.

Must not know what is shown. Nothing but the standard library.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

WIDTH = 24
"""Of Grafana's grid, in columns."""

Kind = Literal["timeseries", "stat", "heatmap", "table"]
Colour = Literal["green", "yellow", "orange", "red", "blue", "text"]

Thresholds = Sequence[tuple[Colour, float | None]]
"""Colours, each from a value on; None: from below."""

HEAT = {
    "mode": "scheme",
    "scheme": "Blues",
    "steps": 32,
    "exponent": 0.5,
    "fill": "dark-blue",
    "reverse": False,
}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
HERE = 'job=~"$job", instance=~"$instance"'
JOB = 'job=~"$job"'
PLAIN: Thresholds = (("blue", None),)


@dataclass(frozen=True)
class Panel:
    """One question and how it is answered.

    Args:
        title: The question, or a plain statement.
        about: What is seen, when it is good and when it is not.
        unit: Grafana's name for it.
        queries: PromQL by legend.
        kind: Of panel.
        width: In columns.
        thresholds: Colours by value.
        stacked: Areas on top of each other.
        least: Where the axis begins; None: wherever the values do.
        most: Where it ends, as `least`.
        colours: Of single series, by legend.
        links: Address by title, on each value.
        hidden: Labels that a table does not show.
    """

    title: str
    about: str
    unit: str
    queries: Mapping[str, str]
    kind: Kind = "timeseries"
    width: int = 8
    thresholds: Thresholds = PLAIN
    stacked: bool = False
    least: float | None = 0
    most: float | None = None
    colours: Mapping[str, Colour] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    hidden: Sequence[str] = ()

    def json(self, number: int, x: int, y: int, height: int) -> dict[str, Any]:
        """As Grafana has it."""
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.about,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": height},
            "fieldConfig": {"defaults": self._defaults(), "overrides": self._overrides()},
            "options": self._options(),
            "targets": [
                self._target(chr(ord("A") + i), legend, query)
                for i, (legend, query) in enumerate(self.queries.items())
            ],
            **self._transformations(),
        }

    def _target(self, name: str, legend: str, query: str) -> dict[str, Any]:
        is_now = self.kind in {"stat", "table"}
        return {
            "refId": name,
            "datasource": DATASOURCE,
            "expr": query,
            "legendFormat": legend,
            "instant": is_now,
            "range": not is_now,
            "format": {"heatmap": "heatmap", "table": "table"}.get(self.kind, "time_series"),
        }

    def _defaults(self) -> dict[str, Any]:
        steps = [{"color": colour, "value": value} for colour, value in self.thresholds]
        defaults: dict[str, Any] = {
            "unit": self.unit,
            "thresholds": {"mode": "absolute", "steps": steps},
            "links": [{"title": title, "url": url, "targetBlank": True} for title, url in self.links.items()],
        }
        if self.least is not None:
            defaults["min"] = self.least
        if self.most is not None:
            defaults["max"] = self.most
        if self.kind == "timeseries":
            defaults["color"] = {"mode": "palette-classic"}
            defaults["custom"] = {
                "drawStyle": "line",
                "lineWidth": 1,
                "fillOpacity": 60 if self.stacked else 0,
                "showPoints": "never",
                "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
                "thresholdsStyle": {"mode": "off" if self.thresholds is PLAIN else "dashed"},
            }
        elif self.kind == "stat":
            defaults["color"] = {"mode": "thresholds"}
        return defaults

    def _overrides(self) -> list[dict[str, Any]]:
        return [
            {
                "matcher": {"id": "byName", "options": legend},
                "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
            }
            for legend, colour in self.colours.items()
        ]

    def _options(self) -> dict[str, Any]:
        match self.kind:
            case "timeseries":
                return {
                    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
                    "tooltip": {"mode": "multi", "sort": "desc"},
                }
            case "stat":
                return {
                    "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
                    "colorMode": "value",
                    "graphMode": "none",
                    "textMode": "auto",
                }
            case "heatmap":
                return {
                    "calculate": False,
                    "cellGap": 0,
                    "color": HEAT,
                    "yAxis": {"unit": self.unit, "reverse": False},
                    "legend": {"show": True},
                    "tooltip": {"mode": "single", "yHistogram": True},
                }
            case "table":
                return {"showHeader": True, "cellHeight": "sm"}

    def _transformations(self) -> dict[str, Any]:
        if self.kind != "table":
            return {}
        hidden = dict.fromkeys(("Time", "__name__", *self.hidden), True)
        return {"transformations": [{"id": "organize", "options": {"excludeByName": hidden}}]}


@dataclass(frozen=True)
class Row:
    """Panels side by side under a heading."""

    title: str
    height: int
    panels: Sequence[Panel]


def dashboard(uid: str, title: str, about: str, rows: Iterable[Row]) -> dict[str, Any]:
    """As Grafana has it; its panels fill the grid from the left, and break lines when it is full."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
                "panels": [],
            }
        )
        x, y = 0, y + 1
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y = 0, y + row.height
            panels.append(panel.json(len(panels) + 1, x, y, row.height))
            x += panel.width
        y += row.height
    return {
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["anytime"],
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 39,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": VARIABLES},
        "annotations": {"list": [LOADED]},
        "links": [LINKS],
        "panels": panels,
    }


def _from_label(name: str, title: str, query: str, *, is_multiple: bool) -> dict[str, Any]:
    return {
        "name": name,
        "label": title,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": is_multiple,
        "includeAll": is_multiple,
        **({"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}} if is_multiple else {}),
    }


VARIABLES: list[dict[str, Any]] = [
    {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
    },
    _from_label("job", "Job", "label_values(anytime_build_info, job)", is_multiple=False),
    _from_label(
        "instance", "Replica", 'label_values(anytime_build_info{job=~"$job"}, instance)', is_multiple=True
    ),
    {
        "name": "runbooks",
        "label": "Runbooks at",
        "description": "Where you can read docs/runbooks of the repository.",
        "type": "textbox",
        "query": "https://git.example.org/anytime/blob/main/docs/runbooks",
        "current": {
            "text": "https://git.example.org/anytime/blob/main/docs/runbooks",
            "value": "https://git.example.org/anytime/blob/main/docs/runbooks",
        },
    },
]

LOADED = {
    "name": "Versions of models come and go",
    "datasource": DATASOURCE,
    "enable": True,
    "iconColor": "blue",
    "expr": f"changes(count by (instance) (anytime_model_info{{{HERE}}})[1m:]) > 0",
    "titleFormat": "Models changed on {{instance}}",
}

LINKS = {
    "title": "Anytime dashboards",
    "type": "dashboards",
    "icon": "external link",
    "tooltip": "The other one, with what is chosen here",
    "tags": ["anytime"],
    "asDropdown": False,
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
}


def rate(metric: str, matchers: str = "", by: str = "") -> str:
    """Per second, of the replicas chosen, over as short a time as Grafana thinks sensible."""
    inner = f"rate({metric}{{{HERE}{', ' if matchers else ''}{matchers}}}[$__rate_interval])"
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def share(part: str, whole: str, by: str = "") -> str:
    """One rate divided by another one that has no labels."""
    return f"{part} / ignoring ({by}) group_left () {whole}" if by else f"{part} / {whole}"


def quantile(q: float, metric: str, by: str = "") -> str:
    """Of a histogram."""
    return f"histogram_quantile({q:g}, {rate(metric + '_bucket', by=f'{by}, le' if by else 'le')})"


def mean(metric: str, by: str = "") -> str:
    """Of a histogram."""
    return f"{rate(metric + '_sum', by=by)} / {rate(metric + '_count', by=by)}"
