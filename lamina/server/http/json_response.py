"""JSON as a whole response."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


def json_response(content: Any) -> Response:
    """A response with JSON in ASCII: text of requests and models may have half a surrogate pair, which UTF-8 cannot
    hold."""
    return json_text(json.dumps(content, separators=(",", ":")))


def json_text(content: str) -> Response:
    """What is JSON already, as a response."""
    return Response(content.encode(), media_type="application/json")
