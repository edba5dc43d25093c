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


def check_room(new: int, there: int, most: int) -> None:
    """Raises Refused where `new` pictures or texts do not fit beside those `there`, `most` in all:
    400 where they never would, else 503."""
    if new > most:
        told = f"{new} pictures or texts; at most {most} are taken at a time (--queue)"
        raise Refused(400, f"{told}: send fewer")
    if there + new > most:
        raise Refused(503, "too many requests wait; ask again later", {"Retry-After": "1"})


async def answer_refused(_: Request, error: Exception) -> Response:
    """A handler of Starlette's."""
    assert isinstance(error, Refused)
    return error.response()
