"""What the command line teaches: examples that are tried, a manual, and words for the shell to complete."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from worker.cli import reference
from worker.cli.app import app
from worker.cli.manual import MANUAL, Example

ROOT = Path(__file__).parents[2]
EXAMPLES = [(name, example) for name, manual in MANUAL.items() for example in manual.examples]
HANDLERS = """
from worker import Handlers

print("imported")
on = Handlers()


@on.derive("public.orders", by="customer_id", name="totals")
async def totals(customer_ids, session): ...


@on.insert("shop.bills", name="bills")
async def bills(change, session): ...
"""


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():
        within = getattr(command, "commands", None)
        found |= (
            {name: command} if within is None else {f"{name} {word}": one for word, one in within.items()}
        )
    return found


def test_the_page_is_what_the_command_line_says() -> None:
    made = reference.reference()
    assert (ROOT / "docs/cli.md").read_text() == made, "python -m worker.cli.reference > docs/cli.md"


def test_every_command_has_a_manual_with_examples() -> None:
    assert MANUAL.keys() == commands().keys()
    assert all(manual.examples for manual in MANUAL.values())


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[example.words for _, example in EXAMPLES])
def test_an_example_is_accepted_and_shown_by_help(name: str, example: Example) -> None:
    words = shlex.split(example.words)
    own = name.split()
    assert words[: len(own)] == own or len(words) == 1, "it belongs to another command"
    # Whatever is wrong with it ends the process.
    commands()[name].make_context(name, words[len(own) :])
    assert f"{example.words}\n" in commands()[name].epilog + "\n"


def tailrace(directory: Path, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return subprocess.run(
        [str(Path(sys.executable).parent / "tailrace"), *arguments],
        cwd=directory,
        env=environment | {"PYTHONPATH": str(ROOT)} | more,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def offered(directory: Path, line: str, **more: str) -> list[str]:
    """What bash is offered for the last word of a line."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = tailrace(directory, _TAILRACE_COMPLETE="complete_bash", **words, **more)
    assert done.stderr == ""
    return done.stdout.split()


def test_a_shell_completes_commands_and_options(tmp_path: Path) -> None:
    assert offered(tmp_path, "tailrace dead-letters re") == ["redrive"]
    assert offered(tmp_path, "tailrace check --dr") == ["--drop-slot"]


def test_a_shell_completes_handlers_and_their_tables(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(HANDLERS)
    assert offered(tmp_path, "tailrace lanes pause to", HANDLERS="shop") == ["totals"]
    assert offered(tmp_path, "tailrace backfill sho", HANDLERS="shop") == ["shop.bills"]


@pytest.mark.parametrize(
    ("words", "rest"),
    [
        ("tailrace lanes pause shop :", ["totals"]),
        ("tailrace lanes pause shop : to", ["totals"]),
        ("tailrace dead-letters list --handler = shop : to", ["totals"]),
        ("tailrace dead-letters list --handler = sh", ["shop:totals"]),
    ],
)
def test_bash_is_offered_what_comes_after_its_colon(tmp_path: Path, words: str, rest: list[str]) -> None:
    (tmp_path / "shop.py").write_text(HANDLERS.replace('name="totals"', 'name="shop:totals"'))
    cut = {"COMP_WORDS": words.replace(" ", "\n"), "COMP_CWORD": str(words.count(" "))}
    done = tailrace(tmp_path, _TAILRACE_COMPLETE="complete_bash", HANDLERS="shop", **cut)
    assert (done.stdout.split(), done.stderr) == (rest, "")


def test_handlers_that_cannot_be_loaded_offer_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit(3)\n")
    assert offered(tmp_path, "tailrace lanes pause t", HANDLERS="broken") == []


def test_the_script_for_the_shell_is_for_the_name_that_people_type(tmp_path: Path) -> None:
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    shown = subprocess.run(
        [sys.executable, "-m", "worker", "--show-completion", "bash"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "_TAILRACE_COMPLETE=complete_bash" in shown.stdout
