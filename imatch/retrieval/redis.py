"""Messages to Redis: each at a key of its own that expires, and an event in the run's stream when it is new.

A batch is one transaction of two commands. MSETNX writes its messages if none of their keys exists. The script
`EVENTS` then gives every key without a time to live its event, and a time to live, which so becomes the mark of a key
whose event was written. If some key existed, the script is called again with the messages, and compares them. Sending
anything again, whatever went wrong before, therefore only lets it live longer.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import PythonRespSerializer
from redis.retry import Retry

from imatch.core.types import ImatchError

PREFIX = "imatch:v1"
"""What all keys begin with; the number rises when the message changes its meaning."""
EVENTS = """
local events, ttl, new = KEYS[1], ARGV[1], 0
local query = #events - #'events' + 1
for i = 2, #KEYS do
  local key, payload = KEYS[i], ARGV[i]
  if payload and redis.call('GET', key) ~= payload then redis.call('SET', key, payload) end
  if redis.call('EXPIRE', key, ttl, 'NX') == 1 then
    redis.call('XADD', events, '*', 'query', string.sub(key, query), 'key', key)
    new = new + 1
  elseif payload then
    redis.call('EXPIRE', key, ttl)
  end
end
redis.call('EXPIRE', events, ttl)
return new
"""
"""KEYS: the stream, and a key a message. ARGV: seconds to live and, to compare, the messages; SET takes a key's time to
live away. The stream lives as long as the message that was sent last: an event is never dropped before its message."""
IN_FLIGHT = 2
"""Batches on their way: one is packed while the server works on the other."""
TIMEOUTS = {"socket_connect_timeout": 5, "socket_timeout": 30}
"""Seconds, where the URL does not say."""
REMEDIES: tuple[tuple[type[Exception], str], ...] = (  # the first that fits: some are kinds of others
    (redis.AuthenticationError, "correct the user and password in REDIS_URL"),
    (
        redis.exceptions.NoPermissionError,
        "it needs multi, exec, msetnx, eval, get, set, expire and xadd on imatch:v1:*",
    ),
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


@dataclass(frozen=True)
class Redis:
    """A Redis server that messages are sent to.

    Attributes:
        url: `redis://user:password@host:port/db`, `rediss://` for TLS, `unix://`; options of redis-py follow a `?`.
        ttl: seconds that a message, and the stream of events, live after they were last sent.
        batch: messages a transaction.

    Raises:
        ImatchError: redis-py would refuse the URL, or take it for another one; a ttl or batch below 1.

    >>> Redis("redis://:secret@localhost:6379/0", ttl=60)
    Redis(ttl=60, batch=500)
    """

    url: str = field(repr=False)
    ttl: int
    batch: int = 500

    def __post_init__(self) -> None:
        if self.ttl < 1 or self.batch < 1:
            raise ImatchError(f"ttl is {self.ttl} seconds, batch {self.batch}: both must be at least 1")
        if not _means_one_server(self.url):
            raise ImatchError(_REFUSED)
        _ = self._client

    @cached_property
    def _client(self) -> redis.Redis:
        try:
            once = Retry(NoBackoff(), 0)
            client = redis.Redis.from_url(self.url, retry=once, command_packer=_Whole(0, _encode), **TIMEOUTS)
            client.connection_pool.make_connection()  # connects to nothing, but refuses options that nobody knows
        except (ValueError, TypeError, AttributeError, redis.RedisError):
            raise ImatchError(_REFUSED) from None  # whose message may hold a part of the password
        return client

    @property
    def place(self) -> str:
        """Which server and database this is, without user and password.

        >>> Redis("rediss://me:secret@example.org?db=2", ttl=60).place
        'example.org:6379/2'
        """
        at = self._client.connection_pool.connection_kwargs
        server = at.get("path") or f"{at.get('host', 'localhost')}:{at.get('port', 6379)}"
        return f"{server}/{at.get('db') or 0}"

    def __call__(self, run: str, messages: Sequence[tuple[str, bytes]]) -> Iterator[tuple[int, int]]:
        """Send the messages of a run in batches, up to `IN_FLIGHT` at a time.

        Args:
            run: part of the keys.
            messages: the query's id and the message itself, each.

        Yields:
            Of each batch in order, when the server has acknowledged it: how many messages, and how many of them are new
            or another than before, which have an event now.

        Raises:
            RedisError: the server cannot be reached or refuses; batches that were on their way may have arrived.
        """
        waiting: deque[Future[tuple[int, int]]] = deque()
        pool = ThreadPoolExecutor(IN_FLIGHT)
        try:
            for first in range(0, len(messages), self.batch):
                if len(waiting) == IN_FLIGHT:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(self._send, run, messages[first : first + self.batch]))
            while waiting:
                yield waiting.popleft().result()
        except (redis.RedisError, OSError, UnicodeError) as error:
            raise RedisError(self._say(error)) from None
        finally:
            pool.shutdown(cancel_futures=True)
            self._client.close()

    def _send(self, run: str, messages: Sequence[tuple[str, bytes]]) -> tuple[int, int]:
        payloads = {os.fsencode(f"{PREFIX}:{run}:{query}"): payload for query, payload in messages}
        keys = [f"{PREFIX}:{run}:events", *payloads]
        with self._client.pipeline() as transaction:
            transaction.msetnx(payloads)
            transaction.eval(EVENTS, len(keys), *keys, self.ttl)
            absent, new = transaction.execute()
        if not absent:
            new += self._client.eval(EVENTS, len(keys), *keys, self.ttl, *payloads.values())
        return len(messages), new

    def _say(self, error: Exception) -> str:
        """What went wrong, in the server's words where it was the server; but some repeat a password, "with args"."""
        reason = str(error).rpartition("of pipeline caused error: ")[2]
        reason = reason.partition(", with args")[0].partition(" script: ")[0]
        at = self._client.connection_pool.connection_kwargs
        for secret in filter(None, (at.get("password"), at.get("username"))):
            reason = reason.replace(secret, "***")
        remedy = next(remedy for kind, remedy in REMEDIES if isinstance(error, kind))
        return f"Redis at {self.place}: {reason.rstrip('.')}: {remedy}"


class _Whole(PythonRespSerializer):
    """Packs a command into one piece; redis-py makes many of 6 kB, and copies each again with every argument."""

    def pack(self, *args: Any) -> list[bytes]:
        return [b"".join(super().pack(*args))]


def _encode(value: str | bytes | int) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


_REFUSED = (
    "REDIS_URL is no URL of a Redis server: write it as redis://user:password@host:6379/0 (rediss:// for TLS), options "
    "of redis-py after a ?, and %23, %2F, %3A, %3F, %40 for # / : ? @ in the password"
)


def _means_one_server(url: str) -> bool:
    """Whether no part of a password that was not percent-encoded is taken for a host, port, database or option."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    if parts.fragment or "@" in parts.path + parts.query:
        return False
    return parts.scheme == "unix" or bool(parts.hostname and re.fullmatch(r"/?\d*", parts.path))
