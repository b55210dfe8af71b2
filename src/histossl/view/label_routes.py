"""Routes of the viewer that write labels and probe them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from histossl.view.answers import as_json
from histossl.view.labelling import Labelling

_LARGEST = 4 * 2**20  # bytes of a request: labels of some 50,000 slides

T = TypeVar("T")


class LabelRoutes:
    """`POST /labels` writes labels, `GET /probe.json?column=NAME` probes them.

    Args:
        labelling: writes and probes.
    """

    def __init__(self, labelling: Labelling) -> None:
        self.labelling = labelling
        self._alone = ThreadPoolExecutor(1, "labels")  # one write or probe after the other

    def routes(self) -> list[Route]:
        """Both routes."""
        return [
            Route("/labels", self.write, methods=["POST"]),
            Route("/probe.json", self.probe, methods=["GET"]),
        ]

    def close(self) -> None:
        """Take no further request; a write that has begun ends whole."""
        self._alone.shutdown(wait=True, cancel_futures=True)

    async def write(self, request: Request) -> Response:
        """Write labels.

        Args:
            request: JSON with `column` and `labels`, slide number -> text.

        Returns:
            JSON: `before`, the labels that these slides had, and `backup`, the name of the copy of slides.csv.

        Raises:
            HTTPException: 403, it does not come from a page of this server; 400, it is not of this form; 413, it is
                too large.
        """
        _check_origin(request)
        column, labels = _parsed(await _body(request), len(self.labelling.cohort))
        before = await self._done(lambda: self.labelling.write(column, labels))
        return as_json({"before": before, "backup": self.labelling.backup})

    async def probe(self, request: Request) -> Response:
        """Probe the labels of a column.

        Args:
            request: with `column` in its query.

        Returns:
            JSON of `LabelProbe`: `classes`, `counts`, `patients`, `auroc`, `folds`, `why`; `predicted` and `sure`, for
            each slide the likeliest class and its probability, null without a vector; `next`, slides to label.

        Raises:
            HTTPException: 404, there is no such column.
        """
        column, cohort = request.query_params.get("column", ""), self.labelling.cohort
        if column not in cohort.columns:
            raise HTTPException(404)
        found = await self._done(lambda: self.labelling.probe(column))
        predicted: list[str | None] = [None] * len(cohort)
        sure: list[float | None] = [None] * len(cohort)
        if found.probabilities is not None:
            best = found.probabilities.argmax(axis=1)
            for slide, row in cohort.row_of.items():
                predicted[slide] = found.classes[best[row]]
                sure[slide] = round(float(found.probabilities[row, best[row]]), 3)
        said = {name: getattr(found, name) for name in ("classes", "counts", "patients", "auroc", "folds", "why")}
        suggested = [cohort.slide_of[row] for row in found.suggested]
        return as_json(said | {"predicted": predicted, "sure": sure, "next": suggested})

    async def _done(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._alone.submit(work))


def _check_origin(request: Request) -> None:
    """A page of others cannot know the token; should it ever, it still cannot write."""
    origin, kind = request.headers.get("origin"), request.headers.get("content-type", "")
    foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    if foreign or request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        raise HTTPException(403, "labels are written by the page of this server only")
    if kind.partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send JSON")


async def _body(request: Request) -> bytes:
    found = b""
    async for part in request.stream():
        found += part
        if len(found) > _LARGEST:
            raise HTTPException(413, "too many labels at once")
    return found


def _parsed(body: bytes, slides: int) -> tuple[str, dict[int, str]]:
    try:
        asked = json.loads(body)
        column, given = asked["column"], asked["labels"]
        labels = {int(slide): text for slide, text in given.items() if slide.isascii() and slide.isdigit()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HTTPException(400, "not a column and labels") from error
    sound = isinstance(column, str) and all(isinstance(text, str) for text in labels.values())
    if not sound or not labels or len(labels) != len(given) or not all(slide < slides for slide in labels):
        raise HTTPException(400, "not a column and labels of slides of this study")
    return column, labels
