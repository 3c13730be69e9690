"""The headers of the handshake, as in recording 01_handshake_headers."""

import json

import pytest
from websockets.asyncio.client import connect

from tests.conformance import recordings
from tests.conformance.listening import key
from tests.conformance.servers import JWT_SECRET, serving

EXPECTED = {
    "cache-control": "max-age=0, private, must-revalidate",
    "connection": "Upgrade",
    "upgrade": "websocket",
}


async def test_the_handshake_offers_no_compression_and_forbids_caching(project: str) -> None:
    apikey = key("anon", JWT_SECRET)
    async with (
        serving(project) as server,
        connect(f"{server.url}/realtime/v1/websocket?apikey={apikey}&vsn=1.0.0") as socket,
    ):
        assert socket.response is not None
        assert socket.response.status_code == 101
        headers = {name.lower(): value for name, value in socket.response.headers.raw_items()}
        assert socket.protocol.extensions == []
    assert {name: headers.get(name) for name in EXPECTED} == EXPECTED


@pytest.mark.skipif(recordings.directory() is None, reason="the recordings are not at hand")
def test_the_recorded_server_answered_the_same() -> None:
    entries = {entry.dir: entry.raw for entry in recordings.read("01_handshake_headers")}
    headers = dict(json.loads(entries["response_headers"]))
    assert {name: headers.get(name) for name in EXPECTED} == EXPECTED
    assert entries["note"] == "negotiated extensions: []"
