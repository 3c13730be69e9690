"""Whether a request that would change something may come from where it comes from.

No cookie is ever looked at, so no other site can borrow a right. This is the second lock: what a browser
sends on behalf of another site, and what an HTML form can send at all, is refused before a token is read.
"""

from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request

_JSON = "application/json"


def refuse_strangers(request: Request) -> None:
    """See that a request to change something is no form and of no other site.

    Raises:
        HTTPException: 403 a browser sent it for another site, 415 its body is not declared as JSON.
    """
    if not _of_this_site(request):
        raise HTTPException(403, "a page of another site has sent this: it is refused whatever its token")
    declared = request.headers.get("content-type")
    if declared is not None and declared.partition(";")[0].strip().lower() != _JSON:
        raise HTTPException(415, f"send the header Content-Type: {_JSON}, or no body and none")


def _of_this_site(request: Request) -> bool:
    """Tell by what browsers say and pages cannot change; who is no browser says nothing."""
    # Behind a proxy Host may be another name, while the browser's own judgement stays true.
    judged = request.headers.get("sec-fetch-site")
    if judged is not None:
        return judged in ("same-origin", "none")
    origin = request.headers.get("origin")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc.lower() == request.headers.get("host", "").lower() != ""
    except ValueError:
        return False


def asks_this_machine(request: Request) -> bool:
    """Tell whether a request came in by loopback, and to a name of it.

    The name counts, too: another site's name can be made to lead to 127.0.0.1, and its pages could then read
    what is there.
    """
    server = request.scope.get("server")
    try:
        named = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return False
    return server is not None and _is_loopback(server[0]) and (named == "localhost" or _is_loopback(named))


def _is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback
