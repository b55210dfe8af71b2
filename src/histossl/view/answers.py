"""What the routes of the viewer share: numbers in addresses, JSON, clients that have gone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

NOT_KEPT = {"cache-control": "no-store"}


class Count(Convertor[int]):
    """Path parameter: a number of at most nine digits."""

    regex = "[0-9]{1,9}"

    def convert(self, value: str) -> int:
        """Parse the parameter.

        Args:
            value: one to nine decimal digits.

        Returns:
            The number.
        """
        return int(value)

    def to_string(self, value: int) -> str:
        """Write the parameter.

        Args:
            value: the number.

        Returns:
            Its decimal digits.
        """
        return str(value)


register_url_convertor("count", Count())


def as_json(content: Any, status: int = 200) -> Response:
    """An answer in JSON that no browser keeps.

    Args:
        content: what `json` can write; no nan.
        status: of HTTP.

    Returns:
        The answer.
    """
    # File names that are not Unicode contain surrogates, which UTF-8 cannot encode; ASCII escapes can hold them.
    text = json.dumps(content, ensure_ascii=True, allow_nan=False)
    return Response(text.encode(), status, media_type="application/json", headers=NOT_KEPT)


async def conflict(_: Request, error: Exception) -> Response:
    """The answer to a typed error of ours.

    Args:
        error: whose message is sent.

    Returns:
        409 with the message.
    """
    return as_json({"error": str(error)}, 409)


async def absent(_: Request, error: Exception) -> Response:
    """The answer where there is no such tile.

    Args:
        error: says which.

    Raises:
        HTTPException: 404, always.
    """
    raise HTTPException(404, str(error)) from error


async def unless_gone(request: Request, work: asyncio.Future[bytes | None]) -> bytes | None:
    """Wait for work, or until the client has gone.

    Args:
        request: of the client.
        work: is cancelled when the client goes.

    Returns:
        What the work gives; None where the client has gone.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() and not work.cancelled() else None
    finally:
        watch.cancel()
        work.cancel()
