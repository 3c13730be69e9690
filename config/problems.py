"""Validation errors of the settings in words.

Pure. A sentence names the environment variable and what it must be; never what it was, which may be a secret
or a slip of the paste.
"""

from collections.abc import Mapping

from pydantic import AliasChoices
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

# Error types of pydantic that a setting can meet; {…} are taken from the error's own context.
_SENTENCES = {
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of ordinary size",
    "int_type": "must be a whole number",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_long": "must have at most {max_length} characters",
    "value_error": "{error}",
}


def environment_names(field: FieldInfo) -> list[str]:
    """Return the environment names of a field, the chief one first."""
    alias = field.validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else []
    return [choice for choice in choices if isinstance(choice, str)]


def problem(fields: Mapping[str, FieldInfo], detail: ErrorDetails) -> str:
    """Put one validation error into one line that begins with the environment's name."""
    location = str(detail["loc"][0]) if detail["loc"] else "settings"
    field = fields.get(location)  # by its own name, where it was given in code
    if field is None:
        field = next((one for one in fields.values() if location in environment_names(one)), None)
        name = location
    else:
        name = environment_names(field)[0]
    if detail["type"] == "missing":
        return f"{name} is not set. {field.description if field else ''}".strip()
    sentence = _SENTENCES.get(detail["type"])
    if sentence is None:
        return f"{name} is not valid: {detail['msg']}"
    return f"{name} {sentence.format_map(detail.get('ctx', {}))}"
