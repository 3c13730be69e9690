"""What the commands do: read the settings, call the part that does it, print what it found.

Each returns an exit code. Nothing here decides anything about changes; tables go to standard output, logs and
problems to standard error.
"""

from pathlib import Path

from config.logging import configure_logging
from config.settings import Settings, load_settings, load_tunables
from worker.cli import printing
from worker.errors import ConfigurationError

FINE, PROBLEMS, MISUSE = 0, 1, 2


def listen() -> int:
    """Run the listener until it is told to end."""
    settings = _settings()
    from worker import runtime  # noqa: PLC0415 - bad settings are told before anything is loaded

    return runtime.listen(settings)


def work() -> int:
    """Run a worker until it is told to end."""
    settings = _settings()
    from worker import runtime  # noqa: PLC0415 - bad settings are told before anything is loaded

    return runtime.work(settings)


def run() -> int:
    """Run a listener and a worker until they are told to end."""
    settings = _settings()
    from worker import runtime  # noqa: PLC0415 - bad settings are told before anything is loaded

    return runtime.run(settings)


def migrate(*, sql: bool) -> int:
    """Run the migrations, or print their SQL."""
    settings = _settings()
    from worker import runtime  # noqa: PLC0415 - bad settings are told before anything is loaded
    from worker.cli.progress import progress  # noqa: PLC0415 - the processes need none of it

    with progress("migrating") as tell:
        return runtime.migrate(settings, sql=sql, progress=tell)


def handlers(*, as_json: bool) -> int:
    """List the handlers with their options; where a handler names none, the setting's value."""
    tunables = load_tunables()
    configure_logging(tunables)
    from worker.loader import load  # noqa: PLC0415 - bad settings are told before anything is loaded

    described = [printing.describe(handler, tunables) for handler in load(tunables.handlers)]
    printing.show_handlers(described, as_json=as_json)
    return FINE


def status(*, verify: bool, as_json: bool) -> int:
    """Show the state; 1 when not ready, or when something is not accounted for."""
    settings = _settings()
    from worker.cli.asking import NobodyAnswers, ask_status, recount  # noqa: PLC0415 - as above

    try:
        told = ask_status(settings)
        if verify:
            told["verification"] = recount(settings)
    except NobodyAnswers as error:
        printing.show_problem(str(error))
        return PROBLEMS
    printing.show_status(told, as_json=as_json)
    if verify:
        return FINE if told["verification"]["ok"] else PROBLEMS
    return FINE if told.get("ready") else PROBLEMS


def models(*, schemas: tuple[str, ...], tables: tuple[str, ...], out: Path | None, check: bool) -> int:
    """Write models, or with `check` tell whether those in the file are still true: 1 where not."""
    if check and out is None:
        raise ConfigurationError(["--check needs --out: the file that is to be compared"])
    settings = _settings()
    from worker.cli.modelling import drift, models_text  # noqa: PLC0415 - as above
    from worker.models import Wanted  # noqa: PLC0415 - as above

    chosen = "".join(
        f" --{name} {','.join(of)}" for name, of in (("schema", schemas), ("tables", tables)) if of
    )
    text = models_text(settings, Wanted(schemas or ("public",), tables), f"python -m worker models{chosen}")
    if out is None:
        printing.show_text(text)
    elif not check:
        out.write_text(text, encoding="utf-8")
    elif lines := drift(text, out):
        printing.show_text("\n".join(lines) + "\n")
        return PROBLEMS
    return FINE


def _settings() -> Settings:
    settings = load_settings()
    configure_logging(settings)
    return settings
