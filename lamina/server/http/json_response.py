"""JSON as a whole response."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


def json_response(content: Any) -> Response:
    """A response with JSON in ASCII: text of requests and models may have half a surrogate pair, which UTF-8 cannot
    hold."""
    return Response(json.dumps(content, separators=(",", ":")).encode(), media_type="application/json")
