"""Searches all that the suite's processes write, and what tests log in their own, for secrets.

A pytest plugin. Secrets are known by value, from the environment that processes are given, and by shape: a
JWT, a secret key, the password in a URL. The search is made once, at the end; what it finds fails the run.
Under xdist each process that runs tests searches what it has heard, and tells the one that counts.
"""

import re
import tempfile
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import pytest

_NAMES = re.compile(r"(KEY|PASSWORD|SECRET|TOKEN)$")
_PASSWORD = re.compile(r"://[^\s:/?#@\[\]]*:([^\s/@]+)@")
_SHAPES = {
    "a JWT": re.compile(r"eyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]+"),
    "a secret key": re.compile(r"\bsb_secret_[\w-]+"),
    "the password of a URL": re.compile(r"://[^\s:/?#@\[\]]*:(?!\[redacted\])[^\s/@]+@"),
}
_SHORTEST = 12
"""A shorter one may be a word, as the password of the embedded Postgres is: in a URL it is found."""
_MOST_SHOWN = 10
_CONTEXT = 100


class Written:
    """What was written, and the secrets that were about."""

    def __init__(self) -> None:
        self._secrets: dict[str, str] = {}
        # A file: a session writes more than a test process should hold.
        self._text = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - ends with us

    def given(self, environment: Mapping[str, str]) -> None:
        """Note the secrets of a process's environment."""
        for name, value in environment.items():
            secrets = [value] if _NAMES.search(name) else _PASSWORD.findall(value)
            self._secrets |= {secret: name for secret in secrets if len(secret) >= _SHORTEST}

    def heard(self, source: str, text: str) -> None:
        """Note what somebody wrote."""
        for line in text.splitlines():
            self._text.write(f"{source}\t{line}\n")

    def found(self) -> list[str]:
        """Return one line for each line with a secret in it, without the secret."""
        self._text.seek(0)
        known = {
            f"the value of {name}": re.compile(re.escape(secret)) for secret, name in self._secrets.items()
        }
        return [told for line in self._text for told in _look(line, known | _SHAPES)]


def _look(line: str, patterns: Mapping[str, re.Pattern[str]]) -> Iterator[str]:
    for what, pattern in patterns.items():
        if found := pattern.search(line):
            before, after = line[: found.start()].rpartition("\t")[2], line[found.end() :]
            source = line.partition("\t")[0]
            yield f"{what} in: {source}: {before[-_CONTEXT:]}<here>{after[:_CONTEXT].rstrip()}"
            return


written = Written()
_told: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Hear what was printed and logged by the process of the test itself."""
    report = yield
    # The last one has what came before, too.
    if report.when == "teardown" and item.get_closest_marker("logs_secrets") is None:
        for name, text in report.sections:
            written.heard(f"{item.nodeid} ({name})", text)
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a process of xdist has found."""
    _told.extend(getattr(node, "workeroutput", {}).get("secrets", []))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Search."""
    found = written.found()
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["secrets"] = found
        return
    _told.extend(found)
    if _told:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say where."""
    if _told:
        terminalreporter.section("secrets were written", red=True)
        for line in _told[:_MOST_SHOWN]:
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"{len(_told)} lines")
