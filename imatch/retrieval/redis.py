"""Messages to Redis: each at a key of its own that expires, and an event in the run's stream for each sending.

A batch is one transaction of SET and XADD for each message: whoever reads an event finds its message. What was not
acknowledged is sent again as a whole. The key makes a message idempotent, its events may be several.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import redis

from imatch.core.types import ImatchError, ImatchWarning

PREFIX = "imatch:v1"
"""What all keys begin with; the number rises when the message changes its meaning."""
TIMEOUTS = {"socket_connect_timeout": 5, "socket_timeout": 30}
"""Seconds, where the URL does not say."""
NEEDS = "its user needs multi, exec, set, expire, xadd, exists and xrange on imatch:v1:*"
SINGLE = "imatch sends to one Redis, a primary, and its transactions to no cluster: give the URL of such a one"
REMEDIES = (  # the first that is found in the names of an error's classes, or in its words
    ("NoPermissionError", NEEDS),
    ("AuthenticationError|DENIED", "correct the user and password in REDIS_URL"),
    ("BusyLoadingError", "wait until it has loaded its data"),
    ("max number of clients", "wait, or raise its maxclients"),
    ("CERTIFICATE_VERIFY", "give the certificate it is signed by: ?ssl_ca_certs=FILE at the end of REDIS_URL"),
    ("SSL", "rediss:// is for a server with TLS, redis:// for one without: correct REDIS_URL"),
    (
        "TimeoutError",
        "look at host, port and TLS in REDIS_URL, or give it longer with ?socket_timeout=60 at its end",
    ),
    ("OutOfMemoryError", "raise its maxmemory, or send for fewer hours"),
    ("Moved|Ask|TryAgain|Cluster|cluster mode|ReadOnlyError|MASTERDOWN", SINGLE),
    ("MISCONF", "it cannot save to its disk: free some space there, and see its log"),
    ("NOREPLICAS", "wait until its replicas are back, or lower its min-replicas-to-write"),
    ("BUSY ", "wait until the script that it runs has ended, or end it with SCRIPT KILL"),
    ("WRONGTYPE", "another program has put something else there: send from a run of another name"),
    ("DB index", "correct the number of the database at the end of REDIS_URL, such as /0"),
    ("ConnectionError", "start it, or correct REDIS_URL, which begins with rediss:// for a server with TLS"),
    ("", "see the server's log; it must be Redis 7.0 or newer"),
)
EVICTS = "when its memory is full, it removes messages before their time: set its maxmemory-policy, {}, to noeviction"


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
            RedisError: the server cannot be reached or refuses, is a cluster, a Sentinel or a replica, or has not kept
                what it acknowledged; a part of the messages may have arrived.

        Warns:
            ImatchWarning: the server removes messages when its memory is full.
        """
        events, sent = os.fsencode(f"{PREFIX}:{run}:events"), []
        try:
            evicted = self._look()
            for first in range(0, len(messages), self.batch):
                batch = messages[first : first + self.batch]
                with self._client.pipeline(transaction=True) as pipeline:
                    for query, payload in batch:
                        key = os.fsencode(f"{PREFIX}:{run}:{query}")
                        pipeline.set(key, payload, ex=self.ttl)
                        pipeline.xadd(events, {"query": os.fsencode(query), "key": key})
                    pipeline.expire(events, self.ttl)  # so no event is dropped before its message
                    sent += pipeline.execute()[1:2]  # the first event's id
                yield len(batch)
            if sent:
                self._find([os.fsencode(f"{PREFIX}:{run}:{query}") for query, _ in messages], events, sent[0])
            if evicted is not None and (others := self._client.info("stats")["evicted_keys"] - evicted):
                self._warn(f"while this was sent it removed {others} keys of other runs or programs")
        except (redis.RedisError, OSError, UnicodeError) as error:
            raise RedisError(self._say(error)) from None
        finally:
            self._client.close()

    def _look(self) -> int | None:
        """Refuse a server that cannot take the messages; of one that evicts, say so, and count what it has evicted."""
        try:
            about = self._client.info()
        except redis.ResponseError as error:
            if not re.match("unknown command|.*no permissions", str(error)):
                raise
            return None  # who may not ask finds out by `_find`
        kind = "replica" if about.get("role") == "slave" else about.get("redis_mode", "standalone")
        if kind != "standalone":
            raise RedisError(f"Redis at {self.place}: it is a {kind}: {SINGLE}")
        policy = about.get("maxmemory_policy", "noeviction")
        if not about.get("maxmemory") or policy == "noeviction":
            return None
        self._warn(EVICTS.format(policy))
        return int(about["evicted_keys"])

    def _warn(self, said: str) -> None:
        warnings.warn(ImatchWarning(f"Redis at {self.place}: {said}"), stacklevel=4)

    def _find(self, keys: Sequence[bytes], events: bytes, first: bytes) -> None:
        """Raise RedisError unless all messages that were acknowledged are there, and their events from the first on."""
        parts = range(0, len(keys), self.batch)
        there = sum(self._client.exists(*keys[part : part + self.batch]) for part in parts)
        if there < len(keys) or not self._client.xrange(events, first, first):
            said = f"{len(keys) - there} of {len(keys)} messages" if there < len(keys) else "events of the messages"
            remedy = "raise its maxmemory, set its maxmemory-policy to noeviction, and let it keep its data on its disk"
            raise RedisError(f"Redis at {self.place}: {said} are gone again, evicted, expired or lost: {remedy}")

    def _say(self, error: Exception) -> str:
        """What went wrong, in the server's words where it was the server; but some repeat a password, "with args"."""
        reason = str(error).rpartition("of pipeline caused error: ")[2].partition(", with args")[0]
        at = self._client.connection_pool.connection_kwargs
        for secret in filter(None, (at.get("password"), at.get("username"))):
            reason = reason.replace(secret, "***")
        known = f"{' '.join(kind.__name__ for kind in type(error).__mro__)} {error}"
        remedy = next(remedy for words, remedy in REMEDIES if re.search(words, known))
        return f"Redis at {self.place}: {reason.rstrip('.')}: {remedy}"


def _check(url: str) -> None:
    """Raise ValueError if a part of a password that is not percent-encoded is a host, port, database or option."""
    parts = urlsplit(url)
    server = parts.scheme == "unix" or (parts.hostname and re.fullmatch(r"/?\d*", parts.path))
    if not server or parts.fragment or "@" in parts.path + parts.query:
        raise ValueError("not the URL of one server")
