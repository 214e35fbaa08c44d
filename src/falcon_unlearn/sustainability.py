"""After k deletion requests: what is left of the utility, and whether earlier forget sets are still forgotten."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from falcon_unlearn.artifacts import Estimate
from falcon_unlearn.earlier import SUITE, EarlierRequest, earlier_requests
from falcon_unlearn.errors import UserError
from falcon_unlearn.report.curve import MEASURES, Point, Request, Sustainability


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"sustainability: {path} cannot be read ({error}): finish that run, or put its folder back"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"sustainability: {path} must hold a JSON object")
    return found


def _own(metrics: Mapping[str, Any], name: str) -> Estimate:
    low, high = (metrics.get("intervals") or {}).get(name) or (None, None)
    return Estimate(metrics.get(name), low, high)


def _forget(metrics: Mapping[str, Any]) -> dict[str, Estimate]:
    found = {measure: _own(metrics, f"forget_{measure}") for measure in MEASURES}
    return {measure: estimate for measure, estimate in found.items() if estimate.value is not None}


def _again(metrics: Mapping[str, Any], request: EarlierRequest) -> dict[str, Estimate]:
    """An earlier forget set's measures as a later run scored them; empty where it did not."""
    suite = (metrics.get("suites") or {}).get(SUITE) or {"metrics": {}}
    found = {measure: suite["metrics"].get(f"{request.name}_{measure}") for measure in MEASURES}
    return {measure: Estimate(**plain) for measure, plain in found.items() if plain is not None}


def sustainability(runs: Sequence[str]) -> Sustainability:
    """Read the curve out of the runs of a line of requests; nothing is scored.

    Args:
        runs: the run folder of the last request; others of the line help to find those that were moved.

    Raises:
        UserError: no line of requests, a run folder is missing or was not scored, or the runs do not fit together.
    """
    requests = earlier_requests(runs)
    if not requests:
        raise UserError("sustainability: name the run folder of the last request")
    metrics = [_read(request.folder / "metrics.json") for request in requests]
    unscored = next((r.folder for r, m in zip(requests, metrics, strict=True) if not m.get("after")), None)
    if unscored is not None:
        raise UserError(f"sustainability: {unscored} was not scored (evaluation.enabled is false)")
    hashes = [request.facts().get("hashes") or {} for request in requests]
    first = metrics[0]["before"]
    points = [Point(0, _own(first, "model_utility"), {1: _forget(first)})]
    for request, found in zip(requests, metrics, strict=True):
        after = found["after"]
        forget = {other.number: _again(after, other) for other in requests[: request.number - 1]}
        forget[request.number] = _forget(after)
        if request.number < len(requests):
            forget[request.number + 1] = _forget(metrics[request.number]["before"])
        points.append(
            Point(request.number, _own(after, "model_utility"), {k: found for k, found in forget.items() if found})
        )
    return Sustainability(
        tuple(
            Request(
                request.number,
                str(request.folder),
                request.patch.id,
                int((request.facts().get("scored_records") or {}).get("forget", 0)),
            )
            for request in requests
        ),
        tuple(points),
        tuple(_notes(requests, points, hashes)),
    )


def _notes(
    requests: Sequence[EarlierRequest], points: Sequence[Point], hashes: Sequence[Mapping[str, str]]
) -> list[str]:
    notes = []
    sets = [{name: digest for name, digest in found.items() if _is_utility(name)} for found in hashes]
    changed = [request.number for request, found in zip(requests, sets, strict=True) if found != sets[0]]
    if changed:
        notes.append(
            f"Utility is measured on other records from request {changed[0]} on than at first: the change there is not "
            "only the model's. Give evaluation.retain and evaluation.utility sets that no request touches."
        )
    absent = [
        (request.number, point.requests)
        for point in points
        for request in requests[: point.requests]
        if request.number not in point.forget
    ]
    if absent:
        notes.append(
            "Not scored again: "
            + ", ".join(f"the forget set of request {request} after request {k}" for request, k in absent)
            + "."
        )
    return notes


def _is_utility(name: str) -> bool:
    """Whether a key of the hashes in ``corpus.json`` is of a set that counts as utility."""
    return (
        name.startswith("evaluation.")
        and not name.startswith(("evaluation.suites.", "evaluation.forget"))
        and (name != "evaluation.oracle")
    )
