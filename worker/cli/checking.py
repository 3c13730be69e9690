"""What the command `check` does: examine, and with `--fix` mend what is safe, and examine again.

Nothing is mended before it has been shown; on a terminal a person is asked, elsewhere `--yes` has to say so.
"""

import asyncio
import sys
from collections.abc import Sequence
from typing import NamedTuple

import typer
from sqlalchemy.ext.asyncio import AsyncEngine

from config.declared import unknown_settings
from config.logging import configure_logging
from config.settings import Settings, load_settings
from worker.check.findings import Finding
from worker.cli import printing
from worker.cli.progress import progress
from worker.errors import ConfigurationError

FINE, PROBLEMS, MISUSE = 0, 1, 2
ROUNDS = 3
"""What is mended may show what it had hidden: a table that is published can lack a grant."""


class Asked(NamedTuple):
    """What was typed."""

    fix: bool = False
    yes: bool = False
    slots: Sequence[str] = ()
    """Replication slots to be dropped."""


def check(asked: Asked, *, as_json: bool) -> int:
    """Examine everything that a start needs; mend what may be mended, where that is asked for."""
    _refuse_misuse(asked, as_json=as_json)
    try:
        settings = load_settings()
    except ConfigurationError as error:
        if not as_json:
            raise
        findings = [Finding("settings", "problem", line) for line in error.problems]
        printing.show_findings(findings, as_json=True)
        return MISUSE
    configure_logging(settings)
    findings = _examine(settings)
    done: list[printing.Step] = []
    if asked.fix:
        if not as_json:
            printing.show_findings(findings, as_json=False, done=done)
        findings = _mend(settings, findings, asked, done, as_json=as_json)
    if as_json or done or not asked.fix:
        printing.show_findings(findings, as_json=as_json, done=done if asked.fix else None)
    failed = any(one.error for one in done)
    return PROBLEMS if failed or any(found.state == "problem" for found in findings) else FINE


def _refuse_misuse(asked: Asked, *, as_json: bool) -> None:
    if not asked.fix and (asked.yes or asked.slots):
        raise ConfigurationError(["--yes and --drop-slot belong to --fix"])
    if asked.fix and not asked.yes and (as_json or not sys.stdin.isatty()):
        raise ConfigurationError(["nobody can be asked here: --fix needs --yes where there is no terminal"])


def _examine(settings: Settings) -> list[Finding]:
    from worker.check.rounds import run_checks, settings_findings  # noqa: PLC0415 - bad settings are told first
    from worker.runtime import handlers_migrations  # noqa: PLC0415 - as above

    environments = handlers_migrations(settings.handlers)
    with progress("examining") as tell:
        return [
            *settings_findings(unknown_settings()),
            *asyncio.run(run_checks(settings, tell, environments)),
        ]


def _mend(
    settings: Settings, findings: list[Finding], asked: Asked, done: list[printing.Step], *, as_json: bool
) -> list[Finding]:
    """Mend what is safe, round by round; returns what is found after that."""
    from worker.check.fixing import fix, fixes_of  # noqa: PLC0415 - as above
    from worker.runtime import upgrade  # noqa: PLC0415 - as above

    async def migrate(engine: AsyncEngine) -> None:
        await upgrade(engine, settings)

    known = {one.slot for found in findings for one in found.fixes if one.slot}
    for slot in asked.slots:
        if slot not in known:
            reason = "there is none of this name that can go: one that is read, or is our own, stays"
            done.append(printing.Step(f"--drop-slot {slot}", reason))
    if done and not as_json:
        printing.show_steps(done)
    for _ in range(ROUNDS):
        tried = {one.words for one in done}
        fixes = [one for one in fixes_of(findings, asked.slots) if one.words not in tried]
        if not fixes or not _agreed([one.words for one in fixes], asked):
            break
        ran = [printing.Step(*one) for one in asyncio.run(fix(settings, fixes, migrate))]
        if not as_json:
            printing.show_steps(ran)
        done += ran
        findings = _examine(settings)
    if not done and not as_json:
        printing.show_steps([])
    return findings


def _agreed(words: Sequence[str], asked: Asked) -> bool:
    if asked.yes:
        return True
    printing.show_intended(words)
    return typer.confirm("Run this?", default=False)
