"""The settings in words: what is declared, as a table for the README, and what only looks like a setting.

Reads the environment's names, never a value.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dotenv import dotenv_values  # pydantic-settings reads .env with it
from pydantic.fields import FieldInfo

from config.problems import environment_names
from config.settings import EnvFile, Settings, Tunables


class Declared(NamedTuple):
    """One setting as it is declared."""

    name: str
    aliases: tuple[str, ...]
    required: bool
    default: str
    """As a person would write it; empty when there is none."""
    unit: str
    reason: str


def declared_settings() -> Sequence[Declared]:
    """Return all settings: first those of the project, then the tunables, in the order of declaration."""
    tunables = Tunables.model_fields
    own = [field for name, field in Settings.model_fields.items() if name not in tunables]
    return [_declared(field) for field in (*own, *tunables.values())]


def settings_table() -> str:
    """Render the settings as the Markdown table of the README."""
    rows = ["| Variable | Default | Unit | Meaning |", "|---|---|---|---|"]
    for setting in declared_settings():
        default = setting.default or ("**required**" if setting.required else "none")
        if setting.default and "`" not in default:
            default = f"`{default}`"
        meaning = setting.reason
        if setting.aliases:
            meaning += " Also read as " + ", ".join(f"`{alias}`" for alias in setting.aliases) + "."
        rows.append(f"| `{setting.name}` | {default} | {setting.unit} | {meaning} |")
    return "\n".join(rows) + "\n"


def unknown_settings(env_file: EnvFile = ".env") -> list[str]:
    """Name the `WORKER_…` variables that are no setting, each with the setting probably meant."""
    known = [setting.name for setting in declared_settings()]
    given = {*os.environ, *(dotenv_values(env_file) if env_file else ())}
    lines = []
    for name in sorted(name for name in given if name.startswith("WORKER_") and name not in known):
        near = difflib.get_close_matches(name, known, n=1)
        lines.append(f"{name} is not a setting" + (f": did you mean {near[0]}?" if near else ""))
    return lines


def _declared(field: FieldInfo) -> Declared:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, Mapping) else {}
    name, *aliases = environment_names(field)
    required = field.is_required()
    return Declared(
        name=name,
        aliases=tuple(aliases),
        required=required,
        default="" if required else str(extra.get("shown", _shown(field.default))),
        unit=str(extra.get("unit", "")),
        reason=field.description or "",
    )


def _shown(default: object) -> str:
    if default is None:
        return ""
    if isinstance(default, tuple):
        return ",".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default)
