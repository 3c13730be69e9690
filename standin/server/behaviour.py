"""How the stand-in behaves where the real server has a setting or a fixed delay.

It is data only. The defaults suit tests and the demo: short delays, no limits. `Behaviour.real()` has the
delays and limits of a freshly installed Supabase Realtime.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """Delays, limits and keys of one stand-in; times are seconds, a limit of None is off.

    Attributes:
        handshake_refusal_delay: before a refused websocket handshake is answered (real server: 2).
        join_error_delay: before a refused phx_join is answered; the socket reads nothing meanwhile (real: 5).
        resubscribe_delay: bounds of the random time between a new access token and the subscription made
            anew with it (real: 1 to 3).
        idle_timeout: a client that sends nothing for so long is closed with 1000 (real: 60).
        send_timeout: a client that takes no byte for so long is cut off without a close frame (real: 30).
        send_buffer_bytes: so much may wait for one client before it is cut off.
        publication_check_interval: how often the publication's tables are compared (real: 60).
        max_channels_per_client: channels of one socket (real: 100).
        max_users: sockets with at least one channel (real: 200).
        max_joins_per_second: joins of all clients, averaged (real: 100).
        max_events_per_second: change frames of all clients, averaged; what is over is dropped in silence
            (real: 100).
        rate_tick: how often the averages are made (real: about 5).
        rate_window: time the averages look back (real: 60).
        max_record_bytes: a larger change is sent as error 413 (real: 1 MiB).
        publication: the publication whose tables can be subscribed to.
        api_keys: role by `sb_…` key, as the hosted gateway knows them. None accepts every `sb_secret_…` as
            service_role and every `sb_publishable_…` as anon.
    """

    handshake_refusal_delay: float = 0.05
    join_error_delay: float = 0.1
    resubscribe_delay: tuple[float, float] = (0.1, 0.3)
    idle_timeout: float = 60.0
    send_timeout: float = 30.0
    send_buffer_bytes: int = 64 * 1024 * 1024
    publication_check_interval: float = 1.0
    max_channels_per_client: int | None = None
    max_users: int | None = None
    max_joins_per_second: float | None = None
    max_events_per_second: float | None = None
    rate_tick: float = 1.0
    rate_window: float = 60.0
    max_record_bytes: int = 1_048_576
    publication: str = "supabase_realtime"
    api_keys: Mapping[str, str] | None = field(default=None)

    @classmethod
    def real(cls) -> "Behaviour":
        """The delays and limits of the real server as it is installed."""
        return cls(
            handshake_refusal_delay=2.0,
            join_error_delay=5.0,
            resubscribe_delay=(1.0, 3.0),
            publication_check_interval=60.0,
            max_channels_per_client=100,
            max_users=200,
            max_joins_per_second=100,
            max_events_per_second=100,
            rate_tick=5.0,
        )
