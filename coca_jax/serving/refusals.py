"""What a request is told that cannot be answered."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

STOPPING = "the server is stopping; ask again later"


class Refused(Exception):
    """A request that is not answered. status: of HTTP; text: one sentence for whoever asked."""

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None):
        super().__init__(text)
        self.status, self.text, self.headers = status, " ".join(text.split()), headers

    def response(self) -> Response:
        """{"error": text}."""
        return JSONResponse({"error": self.text}, self.status, self.headers)


def too_many() -> Refused:
    """For a request that finds more before it than may wait."""
    return Refused(503, "too many requests wait; ask again later", {"Retry-After": "1"})


async def answer_refused(_: Request, error: Exception) -> Response:
    """A handler of Starlette's."""
    assert isinstance(error, Refused)
    return error.response()
