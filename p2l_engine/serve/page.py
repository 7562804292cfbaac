"""The page at ``/``: one static file, and the headers under which a browser runs that file's own script and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page's body, and its headers: type, ETag, caching and Content-Security-Policy. The file is read once.

    The policy allows the file's own style and script by their hashes, requests to the server that the page came from, and no
    markup made from text (``require-trusted-types-for``). A request whose ``If-None-Match`` equals ``etag`` may be answered by
    304 with the same headers.
    """
    body = Path(__file__).with_name("page.html").read_bytes().replace(b"\r\n", b"\n")  # browsers hash what they parsed
    policy = [
        "default-src 'none'",
        f"script-src {_hashes(body, b'script')}",
        f"style-src {_hashes(body, b'style')}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(policy),
        "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "cache-control": "no-cache",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    return body, headers


def _hashes(body: bytes, tag: bytes) -> str:
    """The sources that allow the file's own elements of this kind."""
    texts = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), body, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in texts)
