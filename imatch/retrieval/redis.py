"""Messages to Redis: each at a key of its own that expires, and an event in the run's stream for each sending.

A batch is one transaction of SET and XADD for each message: whoever reads an event finds its message. What was not
acknowledged is sent again as a whole. The key makes a message idempotent, its events may be several.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import redis

from imatch.core.types import ImatchError

PREFIX = "imatch:v1"
"""What all keys begin with; the number rises when the message changes its meaning."""
TIMEOUTS = {"socket_connect_timeout": 5, "socket_timeout": 30}
"""Seconds, where the URL does not say."""
REMEDIES: tuple[tuple[type[Exception], str], ...] = (  # the first that fits: some are kinds of others
    (redis.AuthenticationError, "correct the user and password in REDIS_URL"),
    (redis.exceptions.NoPermissionError, "its user needs multi, exec, set, expire and xadd on imatch:v1:*"),
    (redis.BusyLoadingError, "wait until it has loaded its data"),
    (
        redis.TimeoutError,
        "look at host, port and TLS in REDIS_URL, or give it longer with ?socket_timeout=60 at its end",
    ),
    (redis.exceptions.OutOfMemoryError, "raise its maxmemory, or send for fewer hours"),
    (redis.ReadOnlyError, "it is a replica: give the URL of its primary"),
    (redis.ConnectionError, "start it, or correct REDIS_URL"),
    (Exception, "see the server's log; it must be Redis 7.0 or newer"),
)


class RedisError(ImatchError):
    """Redis could not be reached, or refused: what was not acknowledged is to be sent again."""


class Redis:
    """A Redis server that messages are sent to.

    Args:
        url: `redis://user:password@host:port/db`, `rediss://` for TLS, `unix://`; options of redis-py follow a `?`.
        ttl: seconds that a message, and the stream of events, live after they were last sent.
        batch: messages in one round trip.

    Raises:
        ImatchError: redis-py would refuse the URL, or take it for another one; a ttl or batch below 1.

    >>> Redis("redis://:secret@localhost:6379/0", ttl=60).place
    'localhost:6379/0'
    """

    def __init__(self, url: str, ttl: int, batch: int = 500) -> None:
        if ttl < 1 or batch < 1:
            raise ImatchError(f"ttl is {ttl} seconds, batch {batch}: both must be at least 1")
        self.ttl, self.batch = ttl, batch
        try:
            _check(url)
            self._client = redis.Redis.from_url(url, **TIMEOUTS)
            self._client.connection_pool.make_connection()  # connects to nothing, but refuses options nobody knows
        except (ValueError, TypeError, AttributeError, redis.RedisError):
            raise ImatchError(  # from None: their messages may hold a part of the password
                "REDIS_URL is no URL of a Redis server: write it as redis://user:password@host:6379/0 (rediss:// for "
                "TLS), options of redis-py after a ?, and %23, %2F, %3A, %3F, %40 for # / : ? @ in the password"
            ) from None

    @property
    def place(self) -> str:
        """Which server and database this is, without user and password.

        >>> Redis("rediss://me:secret@example.org?db=2", ttl=60).place
        'example.org:6379/2'
        """
        at = self._client.connection_pool.connection_kwargs
        server = at.get("path") or f"{at.get('host', 'localhost')}:{at.get('port', 6379)}"
        return f"{server}/{at.get('db') or 0}"

    def __call__(self, run: str, messages: Sequence[tuple[str, bytes]]) -> Iterator[int]:
        """Send the messages of a run in batches.

        Args:
            run: part of the keys.
            messages: the query's id and the message itself, each.

        Yields:
            How many messages a batch has, when the server has acknowledged it.

        Raises:
            RedisError: the server cannot be reached or refuses; a part of the batch may have arrived.
        """
        events = os.fsencode(f"{PREFIX}:{run}:events")
        try:
            for first in range(0, len(messages), self.batch):
                batch = messages[first : first + self.batch]
                with self._client.pipeline(transaction=True) as pipeline:
                    for query, payload in batch:
                        key = os.fsencode(f"{PREFIX}:{run}:{query}")
                        pipeline.set(key, payload, ex=self.ttl)
                        pipeline.xadd(events, {"query": os.fsencode(query), "key": key})
                    pipeline.expire(events, self.ttl)  # so no event is dropped before its message
                    pipeline.execute()
                yield len(batch)
        except (redis.RedisError, OSError, UnicodeError) as error:
            raise RedisError(self._say(error)) from None
        finally:
            self._client.close()

    def _say(self, error: Exception) -> str:
        """What went wrong, in the server's words where it was the server; but some repeat a password, "with args"."""
        reason = str(error).rpartition("of pipeline caused error: ")[2].partition(", with args")[0]
        at = self._client.connection_pool.connection_kwargs
        for secret in filter(None, (at.get("password"), at.get("username"))):
            reason = reason.replace(secret, "***")
        remedy = next(remedy for kind, remedy in REMEDIES if isinstance(error, kind))
        return f"Redis at {self.place}: {reason.rstrip('.')}: {remedy}"


def _check(url: str) -> None:
    """Raise ValueError if a part of a password that is not percent-encoded is a host, port, database or option."""
    parts = urlsplit(url)
    server = parts.scheme == "unix" or (parts.hostname and re.fullmatch(r"/?\d*", parts.path))
    if not server or parts.fragment or "@" in parts.path + parts.query:
        raise ValueError("not the URL of one server")
