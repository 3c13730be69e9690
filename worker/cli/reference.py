"""docs/cli.md, made of the command line itself, so that neither can say what the other does not.

`python -m worker.cli.reference` prints it; a test compares.
"""

import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from worker.cli.app import app
from worker.cli.manual import ENTRY, MANUAL

_HEAD = f"""# Command line

<!-- Made by `python -m worker.cli.reference`; a test compares. Change the help of the commands instead. -->

All that `{ENTRY}` can do. `tailrace` is the same, once it is installed; `arq worker.jobs.WorkerSettings` is
`{ENTRY} work`.

```text
{ENTRY} COMMAND [OPTIONS] [ARGUMENTS]
```
"""
_FOOT = """## Exit codes

0: fine. 1: problems were found, or what was asked for was refused; each command says what that means to it.
2: bad usage or configuration, with one line on standard error for each problem, and nothing was done. No
command shows a traceback for what a person can mend, or a secret.

## Environment

Settings are read from the environment and from `.env` in the current directory; the environment goes first.
[The README](../README.md#settings) lists them. Handlers are looked for in the current directory, too.
`NO_COLOR=1` turns colours off; `COLUMNS` sets the width of tables and help.

## Output

Tables are for people, and as wide as the terminal; into a file or a pipe they are not squeezed. `--json` is
for programs: one document on standard output, with names that stay. Logs and problems go to standard error.
Long work shows how far it is on standard error, where that is a terminal, and says nothing elsewhere.

## Shell completion

`tailrace` completes commands, options, and names of handlers and tables, in bash from 4.4 on, zsh and fish:
a test installs it in each of them and presses the key. PowerShell is offered the same, which nobody has
tried. Install it from the shell that is to have it, and open a new one; or print the script of the shell
that you are in, and put it where your system keeps them:

```sh
tailrace --install-completion
tailrace --show-completion
```

Names of handlers come from the modules of `HANDLERS`, which are imported for it; no server is asked.
"""
WIDTH = 116
_VALUES = {"int": "N", "Path": "FILE", "str": "TEXT"}


def reference() -> str:
    """Give the text of docs/cli.md."""
    commands = dict(_commands())
    parts = [_HEAD, *_summary(commands)]
    parts += [_section(name, command) for name, command in commands.items()]
    return "\n".join([*parts, _FOOT])


def _commands() -> Iterator[tuple[str, Any]]:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        within = getattr(command, "commands", None)
        if within is None:
            yield name, command
        else:
            for word, one in within.items():
                yield f"{name} {word}", one


def _summary(commands: dict[str, Any]) -> list[str]:
    rows = ["| command | does |", "|---|---|"]
    for name, command in commands.items():
        first = _paragraphs(command)[0].rstrip(".")
        rows.append(f"| [`{name}`](#{name.replace(' ', '-')}) | {_cell(first)} |")
    return [*rows, ""]


def _section(name: str, command: Any) -> str:  # noqa: ANN401 - of click's, which typer has its own of
    manual = MANUAL[name]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    usage = " ".join([ENTRY, name, *(["[OPTIONS]"] if options else []), *map(_placeholder, arguments)])
    lines = [f"## {name}", "", "```text", usage, "```", ""]
    for paragraph in _paragraphs(command):
        lines += [textwrap.fill(paragraph, WIDTH, break_on_hyphens=False), ""]
    if arguments or options:
        lines += ["| argument or option | meaning |", "|---|---|"]
        lines += [f"| `{one.metavar or one.name.upper()}` | {_meaning(one)} |" for one in arguments]
        lines += [f"| {_names(one)} | {_meaning(one)} |" for one in options]
        lines.append("")
    lines.append("```sh")
    for example in manual.examples:
        lines += [f"# {example.purpose}", f"{ENTRY} {example.words}"]
    lines += ["```", ""]
    if manual.exits:
        lines += [f"Exit codes: {manual.exits}", ""]
    if manual.pages:
        links = (f"[{page.partition('#')[2].replace('-', ' ')}]({page})" for page in manual.pages)
        lines += [f"More in {', '.join(links)}.", ""]
    return "\n".join(lines)


def _paragraphs(command: Any) -> Sequence[str]:  # noqa: ANN401 - as above
    text = inspect.cleandoc(command.help or "")
    return [" ".join(one.split()) for one in text.split("\n\n")]


def _placeholder(argument: Any) -> str:  # noqa: ANN401 - as above
    name = argument.metavar or argument.name.upper()
    name += "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]"


def _names(option: Any) -> str:  # noqa: ANN401 - as above
    kind = getattr(option.type_descriptor.annotation, "__name__", "str")
    takes = "" if option.is_flag else f" {option.metavar or _VALUES.get(kind, 'TEXT')}"
    return ", ".join(f"`{name}{takes}`" for name in (*option.opts, *option.secondary_opts))


def _meaning(parameter: Any) -> str:  # noqa: ANN401 - as above
    said = _cell(parameter.help or "")
    if getattr(parameter, "multiple", False):
        said += " May be given several times."
    default = parameter.default
    flag = getattr(parameter, "is_flag", False)
    if flag or default in (None, "", ()) or callable(default):
        return said
    return f"{said} Default: {default}."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
