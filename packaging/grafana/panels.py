# SPDX-License-Identifier: Apache-2.0
"""Panels and dashboards as values, and their JSON for Grafana 9 and later.

Few of Grafana's options are used, so a page of our own code does what a dashboard library would,
and the JSON changes only when a panel does. Sizes are in units of Grafana's grid, 24 wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

GRID_WIDTH = 24
SCHEMA_VERSION = 37
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Kind = Literal["stat", "timeseries", "heatmap", "table", "state-timeline"]


@dataclass(frozen=True)
class Query:
    """One expression; `legend` as Grafana writes it, with {{labels}}."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel; `help` is what its little i shows."""

    title: str
    kind: Kind
    unit: str
    help: str
    queries: Sequence[Query]
    width: int = 8
    height: int = 7
    stack: bool = False
    max: float | None = None
    # (value from which on, colour), rising; the colour below the first is green.
    steps: Sequence[tuple[float, str]] = ()
    # The colour below the first of the steps.
    low: str = "green"
    # Of tables: column -> (title, unit); other columns are not shown.
    columns: dict[str, tuple[str, str]] = field(default_factory=dict)
    # Of tables: title of a column -> where a click on it leads.
    leads: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Variable:
    """A choice at the top of the dashboard, filled by a query for label values."""

    name: str
    query: str
    # Several values, or all, may be chosen: expressions then compare with =~.
    many: bool = False


@dataclass(frozen=True)
class Link:
    """A link to another dashboard; `carries` the choices made here."""

    title: str
    url: str
    carries: bool


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    rows: Sequence[Row]
    variables: Sequence[Variable]
    links: Sequence[Link] = ()

    def as_json(self) -> dict[str, Any]:
        """The value that Grafana imports."""
        return {
            "uid": self.uid,
            "title": self.title,
            "tags": ["fvd"],
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "schemaVersion": SCHEMA_VERSION,
            "time": {"from": "now-1h", "to": "now"},
            "timezone": "browser",
            "templating": {"list": [_source_variable(), *map(_variable, self.variables)]},
            "links": [_link(link) for link in self.links],
            "annotations": {"list": [_upgrades()]},
            "panels": _placed(self.rows),
        }


def _placed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Give every panel its number and its place: rows from top to bottom, panels left to right."""
    made: list[dict[str, Any]] = []
    top = 0
    for row in rows:
        place = {"x": 0, "y": top, "w": GRID_WIDTH, "h": 1}
        made.append(
            {"id": len(made) + 1, "type": "row", "title": row.title, "collapsed": False,
             "gridPos": place, "panels": []}
        )  # fmt: skip
        top += 1
        left = height = 0
        for panel in row.panels:
            if left + panel.width > GRID_WIDTH:
                left, top, height = 0, top + height, 0
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            made.append({"id": len(made) + 1, "gridPos": place, **_panel(panel)})
            left += panel.width
            height = max(height, panel.height)
        top += height
    return made


def _panel(panel: Panel) -> dict[str, Any]:
    instant = panel.kind in ("stat", "table")
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "custom": _custom(panel),
        "thresholds": {
            "mode": "absolute",
            "steps": [
                {"value": None, "color": panel.low},
                *({"value": value, "color": color} for value, color in panel.steps),
            ],
        },
    }
    if panel.max is not None:
        defaults |= {"min": 0, "max": panel.max}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "targets": [
            _target(number, query, panel.kind, instant)
            for number, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": defaults, "overrides": _overrides(panel)},
        "options": _options(panel),
        "transformations": _transformations(panel),
    }


def _target(number: int, query: Query, kind: Kind, instant: bool) -> dict[str, Any]:
    form = {"table": "table", "heatmap": "heatmap"}.get(kind, "time_series")
    return {
        "refId": chr(ord("A") + number),
        "datasource": SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
        "instant": instant,
        "range": not instant,
        "format": form,
    }


def _custom(panel: Panel) -> dict[str, Any]:
    if panel.kind != "timeseries":
        return {}
    stacking = {"mode": "normal" if panel.stack else "none", "group": "A"}
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if panel.stack else 10,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": stacking,
    }


def _options(panel: Panel) -> dict[str, Any]:
    match panel.kind:
        case "stat":
            reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
            return {"reduceOptions": reduce, "graphMode": "area", "colorMode": "value"}
        case "heatmap":
            return {"calculate": False, "yAxis": {"unit": panel.unit},
                    "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64}}  # fmt: skip
        case "timeseries":
            return {"legend": {"displayMode": "list", "placement": "bottom"},
                    "tooltip": {"mode": "multi", "sort": "desc"}}  # fmt: skip
    return {}


def _transformations(panel: Panel) -> list[dict[str, Any]]:
    """A table joins its queries by device and shows the chosen columns, in their order."""
    if panel.kind != "table":
        return []
    names = list(panel.columns)
    return [
        {"id": "merge", "options": {}},
        {"id": "filterFieldsByName", "options": {"include": {"names": names}}},
        {
            "id": "organize",
            "options": {
                "indexByName": {name: at for at, name in enumerate(names)},
                "renameByName": {name: title for name, (title, _) in panel.columns.items()},
            },
        },
    ]


def _overrides(panel: Panel) -> list[dict[str, Any]]:
    found = []
    for title, unit in panel.columns.values():
        properties: list[dict[str, Any]] = [{"id": "unit", "value": unit}] if unit else []
        if url := panel.leads.get(title):
            target = {"title": "Show it", "url": url, "targetBlank": False}
            properties.append({"id": "links", "value": [target]})
        if properties:
            found.append(
                {"matcher": {"id": "byName", "options": title}, "properties": properties}
            )
    return found


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource",
            "query": "prometheus", "current": {}, "hide": 0}  # fmt: skip


def _variable(variable: Variable) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": variable.name,
        "label": variable.name.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "definition": variable.query,
        "query": {"query": variable.query, "refId": variable.name},
        "refresh": 2,
        "sort": 1,
        "multi": variable.many,
        "includeAll": variable.many,
        "current": {},
    }
    if variable.many:
        made |= {"allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return made


def _link(link: Link) -> dict[str, Any]:
    return {"title": link.title, "type": "link", "url": link.url, "keepTime": True,
            "includeVars": link.carries}  # fmt: skip


def _upgrades() -> dict[str, Any]:
    return {
        "name": "upgrades of fvd",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "blue",
        "expr": "count by (instance, version) (fvd_build_info)"
        " unless count by (instance, version) (fvd_build_info offset 5m)",
        "titleFormat": "fvd {{version}}",
    }
