"""What the documentation says is held against what is there: code, commands, settings, links, log events."""

import ast
import configparser
import json
import re
import shlex
import subprocess
import sys
import tomllib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
import yaml

from config.declared import declared_settings
from tests.pages import FENCE, PAGES, Block, blocks, prose
from tests.stack import ROOT, Servers, project
from worker import loader
from worker.cli.app import app

OPERATIONS = (ROOT / "docs/operations.md").read_text()
PREFIXES = ("WORKER_", "SUPABASE_", "DATABASE_", "REDIS_", "REALTIME_", "HEALTH_")
OF_TESTS = {"TAILRACE_SCHEMAS", "TAILRACE_TRANSCRIPTS"}
FOLDERS = (
    "config",
    "deploy",
    "docs",
    "examples",
    "handlers",
    "migrations",
    "standin",
    "tests",
    "worker",
    "benchmarks",
)
READERS: dict[str, Callable[[str], object]] = {
    "ini": lambda text: configparser.ConfigParser(strict=False, interpolation=None).read_string(
        text if "[" in text else f"[file]\n{text}"
    ),
    "json": json.loads,
    "toml": tomllib.loads,
    "yaml": lambda text: list(yaml.safe_load_all(text)),
}
"""What a block in this language must be understood by."""

RUN_BY = {
    "README.md": "tests/e2e/test_readme.py",
    "docs/incidents.md": "tests/unit/test_docs.py",
    "docs/operations.md": "tests/unit/test_docs.py",
    "docs/project.md": "tests/e2e/test_own_project.py",
    "docs/recipes.md": "tests/kit/test_docs_recipes.py",
    "docs/supabase.md": "tests/integration/test_docs_supabase.py",
    "docs/tutorial.md": "tests/e2e/test_docs_tutorial.py",
    "docs/testing.md": "tests/kit/test_docs_testing.py",
    "docs/webhooks.md": "tests/integration/test_hooks.py",
    "standin/README.md": "tests/conformance/test_docs_standin.py",
}
"""Which test runs the Python and SQL of a page. Here all of it is compiled, and handlers are loaded."""

PROGRAMS = {
    "python",
    "python3",
    ".venv/bin/python",
    "arq",
    "make",
    "tailrace",
    "pip",
    "alembic",
    "honcho",
    "uvicorn",
}
PROGRAMS |= {".", "cd", "mkdir", "touch", "rm", "curl", "docker", "kubectl", "systemctl", "systemd-analyze"}
"""Which words a line of shell may begin with: one that is not among them is mostly a slip."""

OF_OTHERS = {"TOKEN"}
FOLDERS_HERE = ("deploy/", "docs/", "tests/", "examples/", "benchmarks/", "worker/")


def slug(heading: str) -> str:
    """The anchor that a heading has on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)}


def links() -> Iterator[tuple[str, str]]:
    for path in PAGES:
        for target in sorted(set(re.findall(r"\]\(([^)\s]+)\)", prose(path)))):
            if not re.match(r"[a-z]+:", target):
                yield str(path.relative_to(ROOT)), target


def words_of_commands() -> Iterator[tuple[str, list[str]]]:
    """Every `python -m …`, `arq …`, `make …` and `tailrace …` in prose and shell blocks."""
    for path in PAGES:
        text = path.read_text()
        lines = re.findall(r"`((?:python -m|arq|make|tailrace) [^`\n]+)`", FENCE.sub("", text))
        for _, language, block in FENCE.findall(text):
            if language == "sh":
                lines += [line.split("#")[0].strip() for line in block.splitlines()]
        for line in lines:
            words = shlex.split(line, comments=True)
            if words and "=" not in words[0]:
                yield str(path.relative_to(ROOT)), words


def cli() -> dict[str, set[str]]:
    """The options of each command of `python -m worker`; of one with commands of its own, by both words."""
    group = typer.main.get_command(app)
    found = {"": {option for parameter in group.params for option in parameter.opts}}
    for name, command in group.commands.items():  # type: ignore[attr-defined] # a group of click's
        within = getattr(command, "commands", {})
        named = {f"{name} {word}": one for word, one in within.items()} or {name: command}
        for words, one in named.items():
            found[words] = {option for parameter in one.params for option in parameter.opts}
    return found


def test_there_is_documentation() -> None:
    names = {str(path.relative_to(ROOT)) for path in PAGES}
    assert {
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/operations.md",
        "docs/glossary.md",
    } <= names
    assert blocks("python")
    assert list(words_of_commands())


@pytest.mark.parametrize(("page", "target"), list(links()), ids=lambda value: value)
def test_a_link_leads_somewhere(page: str, target: str) -> None:
    file, _, anchor = target.partition("#")
    path = (ROOT / page).parent / file if file else ROOT / page
    assert path.exists()
    if anchor:
        assert anchor in anchors(path)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_that_is_shown_can_be_compiled(block: Block) -> None:
    compile(block.text, block.page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize(
    "block", [block for block in blocks("python") if "Handlers()" in block.text], ids=str
)
def test_handlers_that_are_shown_can_be_loaded(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"shown_{zlib.crc32(block.text.encode())}"
    (tmp_path / f"{name}.py").write_text(block.text)
    monkeypatch.syspath_prepend(tmp_path)
    handlers = [one for one in loader.load([name]) if not one.name.startswith("cache:")]
    assert len(handlers) == sum(
        any("on." in ast.unparse(decorator) for decorator in node.decorator_list)
        for node in ast.parse(block.text).body
        if isinstance(node, ast.AsyncFunctionDef)
    )


def test_every_block_is_closed_and_in_a_language_that_is_tested() -> None:
    for path in PAGES:
        fences = re.findall(r"^ *```", path.read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(page=str(path.relative_to(ROOT)))), path
    assert {block.language for block in blocks()} <= {"python", "sql", "sh", "text", *READERS}


@pytest.mark.parametrize("block", blocks(*READERS), ids=str)
def test_what_is_shown_of_files_can_be_read(block: Block) -> None:
    READERS[block.language](block.text)


@pytest.mark.parametrize("page", sorted({block.page for block in blocks("python", "sql")}))
def test_python_and_sql_of_a_page_is_run_by_a_test(page: str) -> None:
    path = ROOT / RUN_BY[page]
    assert path.exists()
    assert Path(page).name in path.read_text()


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_shell_that_is_shown_is_right(block: Block) -> None:
    done = subprocess.run(
        ["sh", "-n"], input=block.text, capture_output=True, text=True, timeout=10, check=False
    )
    assert done.returncode == 0, done.stderr
    known = {setting.name for setting in declared_settings()} | OF_OTHERS
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            assert words.pop(0).split("=")[0] in known, line
        if words:
            assert words[0] in PROGRAMS, line
            paths = [word for word in words if word.startswith(FOLDERS_HERE)]
            assert [path for path in paths if not list(ROOT.glob(path))] == [], line


def test_nobody_is_sent_to_a_package_index() -> None:
    code = [ROOT / "pytest_tailrace.py"]
    for folder in ("benchmarks", "config", "examples", "standin", "worker"):
        code += (ROOT / folder).rglob("*.py")
    files = {path: path.read_text() for path in [*code, *(ROOT / page for page in PAGES)]}
    asked = {
        (path, found)
        for path, text in files.items()
        for found in re.findall(r"pip install '?(\S*(?:tailrace|\[)[^\s'`]*)", text)
    }
    assert len(asked) > 4
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    allowed = [f"{where}[{extra}]" for where in ("../tailrace", ".") for extra in extras]
    assert {one for one in asked if one[1] not in [*allowed, "../tailrace"]} == set()


def test_every_setting_that_is_named_exists() -> None:
    known = OF_TESTS | {name for setting in declared_settings() for name in (setting.name, *setting.aliases)}
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in PAGES
        for name in re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", path.read_text())
        if name.startswith((*PREFIXES, "TAILRACE_")) and name not in known
    ]
    assert wrong == []


def test_every_command_that_is_shown_exists_with_its_options() -> None:
    commands = cli()
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, words in words_of_commands():
        match words:
            case ["python", "-m", "worker", command, *rest] | ["tailrace", command, *rest]:
                if command.startswith("-"):
                    command, rest = "", [command, *rest]
                if command not in commands and rest:
                    command, rest = f"{command} {rest[0]}", rest[1:]
                assert command in commands, f"{page}: {words}"
                used = {word for word in rest if word.startswith("-")}
                assert used <= commands[command], f"{page}: {words}"
            case ["python", "-m", module, *_]:
                assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists() or (
                    ROOT / module.replace(".", "/") / "__main__.py"
                ).exists(), f"{page}: {words}"
            case ["arq", *rest]:
                assert rest[-1] in {"worker.jobs.WorkerSettings", "…"}, f"{page}: {words}"
            case ["make", target, *_]:
                assert target in targets, f"{page}: {words}"


def test_every_command_is_documented() -> None:
    text = "".join(path.read_text() for path in PAGES)
    assert [name for name in cli() if name and f"python -m worker {name}" not in text] == []


@pytest.mark.parametrize(
    ("table", "page"), [("settings_table", "README.md"), ("metrics_table", "docs/operations.md")]
)
def test_the_command_that_prints_a_table_prints_that_of_the_page(table: str, page: str) -> None:
    (line,) = [
        words for _, words in words_of_commands() if words[0] == ".venv/bin/python" and table in words[-1]
    ]
    done = subprocess.run(
        [sys.executable, *line[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() in (ROOT / page).read_text()


def logged() -> set[str]:
    """Every event that the processes log, by its first argument."""
    events = set()
    for path in (ROOT / "worker").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "log"
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                events.add(str(node.args[0].value))
    return events


def test_the_table_of_log_events_is_the_log_of_the_code() -> None:
    section = OPERATIONS.split("\n## Log\n")[1].split("\n## ")[0]
    told = set()
    for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE):
        told |= set(re.findall(r"`([^`]+)`", row))
    assert told == logged()


def test_the_table_of_check_has_all_that_it_examines() -> None:
    names = set()
    for path in (ROOT / "worker/check").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                first = node.args[0]
                if node.func.id in ("Finding", "by_sql", "_within") and isinstance(first, ast.Constant):
                    names.add(first.value)
    section = OPERATIONS.split("\n## Check\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z_ ]+)` \|", section, re.MULTILINE)) == names


def health_reasons() -> str:
    return OPERATIONS.split("\n## Health\n")[1].split("\n## ")[0]


def test_no_reason_of_readiness_is_made_up() -> None:
    texts = [text for path in (ROOT / "worker").rglob("*.py") for text in strings(path)]
    rows = re.findall(r"^\| (`[^|]+) \|", health_reasons(), re.MULTILINE)
    reasons = [reason for row in rows for reason in re.findall(r"`([^`]+)`", row)]
    assert len(reasons) > 20
    wrong = []
    for reason in reasons:
        parts = [part.strip(" ():…") for part in re.split(r"…|\(", reason)]
        longest = max(parts, key=len)
        if not any(longest in text for text in texts):
            wrong.append(reason)
    assert wrong == []


def strings(path: Path) -> list[str]:
    """Every text in a module; of an f-string its fixed parts, joined by nothing."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            fixed = [
                part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "…"
                for part in node.values
            ]
            found.append("".join(fixed))
    return found


def test_every_file_that_is_named_exists() -> None:
    named = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[^`\s]*)`")
    found = [(path.name, name) for path in PAGES for name in named.findall(prose(path))]
    assert len(found) > 20
    real = [(page, name.split("::")[0].rstrip("/")) for page, name in found if "NNNN" not in name]
    assert [(page, name) for page, name in real if not list(ROOT.glob(name))] == []


def test_the_tables_of_the_schema_are_those_of_the_migrations() -> None:
    made = set()
    for path in (ROOT / "migrations/versions").glob("*.py"):
        made |= set(re.findall(r"create table tailrace\.(\w+)", path.read_text()))
    architecture = (ROOT / "docs/architecture.md").read_text()
    section = architecture.split("| table in schema `tailrace` |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == made


def test_every_test_that_shows_a_schedule_exists() -> None:
    architecture = (ROOT / "docs/architecture.md").read_text()
    section = architecture.split("\n## Schedules that break the obvious\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| .+ \| `[^`]+` \| (.+) \|$", section, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 38))
    for number, shown in rows:
        tests = re.findall(r"`(tests/[^`]+\.py)::(\w+)`", shown)
        assert tests or "not tested" in shown, number
        for path, name in tests:
            tree = ast.parse((ROOT / path).read_text())
            functions = [
                node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            assert name in functions, f"{number}: {path}::{name}"


def test_every_page_is_in_the_index() -> None:
    listed = {target for page, target in links() if page == "docs/index.md"}
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= listed


def test_the_changelog_has_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_glossary_has_each_word_once_and_in_order() -> None:
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    words = [word for row in rows for word in row.split(", ")]
    assert len(words) == len(set(words))
    assert rows == sorted(rows)


def test_the_guide_to_incidents_knows_every_alert() -> None:
    rules = (ROOT / "deploy/prometheus/tailrace.rules.yaml").read_text()
    guide = (ROOT / "docs/incidents.md").read_text()
    assert sorted(re.findall(r"`(Tailrace\w+)`", guide)) == sorted(re.findall(r"alert: (\w+)", rules))


async def test_the_sql_of_incidents_runs_and_changes_nothing(shared: Servers) -> None:
    tables = (
        "create table orders (id bigint primary key, customer_id bigint, amount numeric);"
        "create table derived_totals (customer_id bigint primary key, amount numeric);"
        "create view customer_totals as select * from derived_totals;"
        "insert into orders values (1, 7, 2), (2, 8, 3); insert into derived_totals values (7, 2), (8, 4)"
    )
    statements = blocks("sql", page="docs/incidents.md")
    assert len(statements) > 8
    async with project(shared, tables, "handlers") as made:
        await made.db.execute(
            "insert into tailrace.handlers (name, kind, tables) values ('x:x', 'change', '{public.orders}');"
            "insert into tailrace.held (handler, lanes, keys, lsn, ordinal, source, attempts, error)"
            " values ('x:x', '{1}', array['7'], 1, 0, 'wal', 1, 'no');"
            "insert into tailrace.gaps (until, cause, tables) values (now(), 'x', '{}');"
            "insert into tailrace.audit (who, via, action, handler) values ('me', 'command', 'pause', 'x:x')"
        )
        found = {}
        for block in statements:
            async with made.db.transaction(readonly=True):
                rows = await made.db.fetch(block.text)
            found[block.text] = [tuple(row.values()) for row in rows]
        wrong = next(rows for text, rows in found.items() if "should_be" in text)
        assert wrong == [(8, 4, 3)]
        for table in ("tailrace.held", "tailrace.gaps", "tailrace.audit"):
            assert [len(rows) for text, rows in found.items() if f"from {table}" in text] == [1], table


async def test_the_sql_of_operations_runs(shared: Servers) -> None:
    tables = "create table orders (id bigint primary key, customer_id bigint)"
    statements = blocks("sql", page="docs/operations.md")
    assert len(statements) >= 4
    async with project(shared, tables, "handlers") as made:
        await made.db.execute(
            "insert into tailrace.handlers (name, kind, tables, state) values"
            " ('handlers.customer_totals:customer_totals', 'derive', '{public.orders}', 'active'),"
            " ('handlers.old:old', 'derive', '{public.orders}', 'orphaned')"
        )
        await made.db.execute("insert into tailrace.gaps (until, cause, tables) values (now(), 'x', '{}')")
        for block in statements:
            await made.db.execute(block.text)
        assert await made.db.fetchval("select state from tailrace.gaps where id = 1") == "acknowledged"
        assert await made.db.fetchval("select count(*) from tailrace.handlers") == 1
