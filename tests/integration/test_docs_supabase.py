"""Every example of docs/supabase.md, run."""

import ast
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import httpx
import jwt
import pytest

from tests.stack import ROOT, SECRET
from worker.web import serve

PAGE = (ROOT / "docs/supabase.md").read_text()


def example(heading: str, number: int = 0) -> str:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return str(re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[number])


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    made = types.ModuleType("shown_by_docs_supabase")
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


def run(text: str, module: types.ModuleType) -> dict[str, Any]:
    exec(compile(ast.parse(text), "docs/supabase.md", "exec"), module.__dict__)  # noqa: S102 - our own page
    return module.__dict__


async def test_tokens(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="requirements.lock has changed: make setup")
    monkeypatch.setenv("SUPABASE_URL", "https://abc.supabase.co")
    monkeypatch.setenv("SUPABASE_JWT_SECRET", SECRET)
    app = run(example("Tokens"), module)["app"]
    claims = {"iss": "https://abc.supabase.co/auth/v1", "sub": "u1", "aud": "authenticated", "exp": 4e9}
    good = jwt.encode(claims | {"role": "authenticated"}, SECRET, "HS256")
    async with (
        serve(app, "127.0.0.1", 0) as served,
        httpx.AsyncClient(base_url=served.url, trust_env=False) as client,
    ):
        answer = await client.get("/me", headers={"Authorization": f"Bearer {good}"})
        refused = await client.get("/me", headers={"Authorization": f"Bearer {good}x"})
    assert answer.json() == {"id": "u1", "role": "authenticated"}
    assert refused.status_code == 401
