"""What the signature of a handler says: whether it wants a context, and of which model its changes' rows are.

Pure. Annotations are read if they can be: those that exist for type checkers alone say nothing here.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args, get_origin

from sqlalchemy import inspect as inspect_mapped
from sqlalchemy.orm import Mapper

from worker.change import Change

Kind = Literal["derive", "change"]

_PARAMETERS = 2, 3  # of every handler; with a context


class Signature(NamedTuple):
    """A signature, read."""

    wants_context: bool = False
    model: type[Any] | None = None
    """Of `Change[Model]`."""
    problems: tuple[str, ...] = ()


def read_signature(function: Callable[..., Any], kind: Kind, *, wants_list: bool) -> Signature:
    """Read the signature of a handler; what is wrong with it is in `problems`."""
    first = "keys" if kind == "derive" else "changes" if wants_list else "change"
    name = getattr(function, "__name__", "handler")
    wanted = f"async def {name}({first}, session) or ({first}, session, context)"
    if not inspect.iscoroutinefunction(function):
        return Signature(problems=(f"must be a coroutine function: {wanted}",))
    parameters = _parameters(function)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    others = [
        p
        for p in parameters
        if p not in positional
        and p.kind != p.VAR_KEYWORD
        and (p.kind == p.VAR_POSITIONAL or p.default is p.empty)
    ]
    least, most = _PARAMETERS
    if others or not least <= len(required) <= most:
        return Signature(problems=(f"has a wrong signature, it must be: {wanted}",))
    wants_context = len(positional) > least and (len(required) > least or positional[2].name == "context")
    if kind == "derive":
        return Signature(wants_context)
    return _of_change(required[0].annotation, wants_context, wants_list=wants_list)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function, eval_str=True).parameters.values())
    except (NameError, TypeError, AttributeError, SyntaxError):
        # Annotations under `if TYPE_CHECKING:` exist for type checkers alone.
        return list(inspect.signature(function).parameters.values())


def _of_change(annotation: object, wants_context: bool, *, wants_list: bool) -> Signature:  # noqa: FBT001 - handed on
    """Read how the changes of a change handler are annotated."""
    if isinstance(annotation, str):
        problems = (_UNREADABLE,) if "Change[" in annotation else ()
        return Signature(wants_context, None, problems)
    one = _is_change(annotation)
    inner = get_args(annotation)
    many = not one and len(inner) == 1 and _is_change(inner[0])
    if one and wants_list:
        return Signature(problems=("batch= gives the function a list: annotate list[Change]",))
    if many and not wants_list:
        problem = "is given one change at a time: annotate Change, or ask for lists with batch="
        return Signature(problems=(problem,))
    (model,) = get_args(annotation if one else inner[0] if many else None) or (None,)
    if model is None or model is Any:
        return Signature(wants_context)
    if not isinstance(inspect_mapped(model, raiseerr=False), Mapper):
        shown = getattr(model, "__name__", model)
        return Signature(problems=(f"annotates Change[{shown}], which is no class mapped by SQLAlchemy",))
    return Signature(wants_context, model)


_UNREADABLE = (
    "annotates Change[…] with a name that exists for type checkers alone:"
    " import the model outside of `if TYPE_CHECKING:`"
)


def _is_change(annotation: object) -> bool:
    return annotation is Change or get_origin(annotation) is Change
