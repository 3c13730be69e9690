"""The fault switches: their names, their types, their state. What they do is done where it happens.

One table checks both what comes over HTTP and what a test assigns in-process.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

CURRENT: Literal["current"] = "current"
_CLOSE_CODES = frozenset([*range(1000, 1004), 1006, *range(1007, 1015), *range(3000, 5000)])
_REFUSALS = (401, 403, 404, 429, 500, 503)
_ERROR_EVENTS = (400, 401)


class FaultError(ValueError):
    """A switch that does not exist, or a value it cannot have; the message says which and what it takes."""


def _flag(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise FaultError(f"{name} takes true or false, not {value!r}")


def _share(name: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise FaultError(f"{name} takes a share from 0 to 1, not {value!r}")


def _whole(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise FaultError(f"{name} takes a whole number from 0 on, not {value!r}")


def _milliseconds(name: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    raise FaultError(f"{name} takes milliseconds from 0 on, not {value!r}")


def _flag_or_current(name: str, value: object) -> bool | Literal["current"]:
    if isinstance(value, bool):
        return value
    if value == CURRENT:
        return CURRENT
    raise FaultError(f'{name} takes true, false or "current" (only the connections open now), not {value!r}')


def _flag_or_text(name: str, value: object) -> bool | str:
    if isinstance(value, bool | str):
        return value
    raise FaultError(f"{name} takes true, false or the reason as text, not {value!r}")


def _text(name: str, value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise FaultError(f"{name} takes the message as text, not {value!r}")


def _choice(name: str, value: object, allowed: tuple[int, ...]) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value in allowed:
        return value
    raise FaultError(f"{name} takes one of {', '.join(map(str, allowed))}, not {value!r}")


def _refusal(name: str, value: object) -> bool | int:
    return value if isinstance(value, bool) else _choice(name, value, _REFUSALS)


def _error_events(name: str, value: object) -> int | None:
    return None if value is None or value is False else _choice(name, value, _ERROR_EVENTS)


def _close_code(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value in _CLOSE_CODES:
        return value
    raise FaultError(
        f"{name} takes a close code such as 1000, 1012 or 4000 (1006: no close frame), not {value!r}"
    )


_SWITCHES: Mapping[str, tuple[Callable[[str, object], Any], Any]] = {
    "drop": (_share, 0.0),
    "drop_next": (_whole, 0),
    "duplicate": (_share, 0.0),
    "delay_ms": (_milliseconds, 0.0),
    "truncate": (_flag, False),
    "oversize": (_flag, False),
    "error_events": (_error_events, None),
    "silent": (_flag_or_current, False),
    "half_open": (_flag_or_current, False),
    "withhold_subscribed": (_flag, False),
    "refuse_joins": (_flag_or_text, False),
    "refuse_connections": (_refusal, False),
}
_ACTIONS: Mapping[str, Callable[[str, object], Any]] = {
    "close": _close_code,
    "expire_tokens": _flag,
    "system_error": _text,
    "resubscribed": _flag,
    "late_close": _flag,
}


class Faults:
    """The switches that stay on until they are changed; assigning a wrong value raises FaultError.

    Attributes:
        drop: share of the change frames that are lost.
        drop_next: so many change frames from now on are lost.
        duplicate: share of the change frames that are sent twice.
        delay_ms: change frames come so much later, in their order.
        truncate: every change comes as a row that is too large (error 413).
        oversize: the next change frame is padded beyond 1 MiB.
        error_events: every change comes as error 400 or 401, without its row.
        silent: no change frame is sent, everything else is; "current": on the connections open now.
        half_open: TCP stays open, but nothing is read or answered; "current": on the connections open now.
        withhold_subscribed: joins are answered, but the subscription is never made.
        refuse_joins: joins are refused, with this reason if it is a text.
        refuse_connections: TCP is cut at once, or the handshake refused with this HTTP status.
    """

    drop: float
    drop_next: int
    duplicate: float
    delay_ms: float
    truncate: bool
    oversize: bool
    error_events: int | None
    silent: bool | Literal["current"]
    half_open: bool | Literal["current"]
    withhold_subscribed: bool
    refuse_joins: bool | str
    refuse_connections: bool | int

    def __init__(self, on_change: Callable[[frozenset[str]], None] | None = None) -> None:
        object.__setattr__(self, "_on_change", None)
        self.clear()
        object.__setattr__(self, "_on_change", on_change)

    if not TYPE_CHECKING:  # a type checker that saw it would accept every name

        def __setattr__(self, name: str, value: object) -> None:
            if name not in _SWITCHES:
                raise FaultError(f"there is no switch {name!r}; there are {', '.join(_SWITCHES)}")
            self._put({name: _SWITCHES[name][0](name, value)})

    def clear(self) -> None:
        """Every switch off."""
        self._put({name: default for name, (_check, default) in _SWITCHES.items()})

    def update(self, values: Mapping[str, object]) -> None:
        """Set several at once; if one is wrong, none is set."""
        self._put({name: _SWITCHES[name][0](name, value) for name, value in values.items()})

    def snapshot(self) -> dict[str, Any]:
        """The state of every switch."""
        return {name: getattr(self, name) for name in _SWITCHES}

    def affect_changes(self) -> bool:
        """Whether any switch asks for a closer look at change frames."""
        return bool(
            self.drop
            or self.drop_next
            or self.duplicate
            or self.delay_ms
            or self.truncate
            or self.oversize
            or self.error_events
            or self.silent is True
        )

    def _put(self, values: Mapping[str, object]) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)
        on_change: Callable[[frozenset[str]], None] | None = self.__dict__["_on_change"]
        if on_change is not None:
            on_change(frozenset(values))


def split(values: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Checked switches and checked actions (things done once, now) out of one request's JSON.

    Raises:
        FaultError: not an object, an unknown name, or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise FaultError('an object of switches is expected, as {"drop": 0.1}')
    switches: dict[str, Any] = {}
    actions: dict[str, Any] = {}
    for name, value in values.items():
        if name in _SWITCHES:
            switches[name] = _SWITCHES[name][0](name, value)
        elif name in _ACTIONS:
            actions[name] = _ACTIONS[name](name, value)
        else:
            known = ", ".join([*_SWITCHES, *_ACTIONS])
            raise FaultError(f"there is no switch {name!r}; there are {known}")
    return switches, {name: value for name, value in actions.items() if value is not False}
