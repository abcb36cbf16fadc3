"""The quality bench's rows as cells, a line of its table each: shares and means with their intervals, distances from true renders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import measures
from .report import markdown_table

SHARES = {
    "right": "right",
    "asked": "asked",
    "one": "one",
    "repeated": "repeated",
    "none": "none",
    "shape": "kind",
    "colour": "colour",
    "faces right": "face",
}
"""Columns that are shares, and what a cell calls them."""
FIGURES = ("FD whole", "FD crops", "detail", "seams", "drift", "evaluations", "seconds")


def cell_of(rows: Sequence[dict], true: Sequence[dict]) -> dict:
    """One line of the table; a figure is (mean, low, high)."""
    faces = [row["face"] for row in rows if row["face"] is not None]
    figure, share = measures.mean_with_interval, measures.share_with_interval
    cell = {key: rows[0][key] for key in ("method", "scale", "aspect", "width", "height")}
    cell |= {"pictures": len(rows), "faces": len(faces)}
    cell |= {name: share([row[name] for row in rows]) for name in ("right", "kind", "colour", "look", "ground")}
    cell["asked"] = share([row["subjects"] == 1 and row["kind"] and row["colour"] for row in rows])
    cell["one"] = share([row["subjects"] == 1 for row in rows])
    cell["repeated"] = share([row["subjects"] > 1 for row in rows])
    cell["none"] = share([row["subjects"] == 0 for row in rows])
    cell["face"] = share(faces) if faces else None
    cell["seams"] = figure([row["seams"] for row in rows])
    cell["detail"] = float(np.mean([row["detail"] for row in rows]) / np.mean([row["detail_true"] for row in rows]))
    drifts = [row["drift"] for row in rows if row["drift"] is not None]
    cell["drift"] = figure(drifts) if drifts else None
    for name in ("whole", "crops"):
        cell[f"frechet_{name}"] = _distance(rows, true, name)
    for name in ("seconds", "evaluations"):
        cell[name] = float(np.median([row[name] for row in rows])) if name in rows[0] else None
    return cell


def _distance(rows: Sequence[dict], true: Sequence[dict], name: str) -> float | None:
    """Frechet distance of a cell's features from those of the true renders of its scenes; None below 16 pictures."""
    if min(len(rows), len(true)) < 16:
        return None
    ours, theirs = (np.array([one for row in some for one in row[name]]) for some in (rows, true))
    return measures.frechet(ours, theirs)


def table(cells: Sequence[dict]) -> str:
    """Markdown."""
    lines = []
    for cell in cells:
        figures = [_share(cell[name]) for name in SHARES.values()]
        figures += [_number(cell[name]) for name in ("frechet_whole", "frechet_crops", "detail")]
        figures += [_number(cell[name] and cell[name][0]) for name in ("seams", "drift")]
        figures += [_number(cell[name], 0 if name == "evaluations" else 1) for name in ("evaluations", "seconds")]
        lines.append((f"{cell['scale']:g}x {cell['aspect']}", cell["method"], cell["pictures"], *figures))
    return markdown_table(("size", "method", "n", *SHARES, *FIGURES), lines)


def _share(figure: tuple[float, float, float] | None) -> str:
    return "" if figure is None else f"{figure[0]:.2f} ({figure[1]:.2f} to {figure[2]:.2f})"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
