"""The playground: one page, without anything from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

router = APIRouter()
PAGE = Path(__file__).parents[1] / "playground" / "index.html"
# The page's script and style stand in it; it loads nothing from anywhere, and nobody may frame it.
POLICY = (
    "default-src 'self'; connect-src 'self' data: blob:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)


@router.get("/", include_in_schema=False)
async def playground() -> Response:
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": POLICY})
