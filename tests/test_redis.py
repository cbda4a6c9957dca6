"""The Redis sink, against real servers that are started, killed and started again."""

import inspect
import json
import os
import re
import shlex
import shutil
import socket
import socketserver
import subprocess
import sys
import textwrap
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import jsonschema
import pytest

from imatch.cli.main import main
from imatch.core import compute
from imatch.core.files import read_json, write_json
from imatch.core.step import start_step
from imatch.core.types import ImatchError, ImatchWarning
from imatch.retrieval.redis import Redis, RedisError
from imatch.steps.sending import message, send
from tests.command import command

redis = pytest.importorskip("redis", reason="redis-py is not installed: pip install -c constraints.txt -e '.[redis]'")

SCHEMA = json.loads((Path(inspect.getfile(Redis)).parent / "coarse_localisation.schema.json").read_text())
EVENTS = "imatch:v1:demo:events"
TTL = 1000


class Server:
    """A redis-server on a free port of the loopback, with a folder of its own."""

    def __init__(self, folder, *options):
        self.folder, self.options = folder, options
        folder.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process, self.config = None, []
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self):
        with (self.folder / "log").open("ab") as log:
            where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
            kept = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
            command = ["redis-server", *self.config, *where, *kept, *self.options]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        for _ in range(1000):
            assert self.process.poll() is None, (self.folder / "log").read_text()
            if re.search("Ready to accept connections|Sentinel ID", (self.folder / "log").read_text()):
                return self
            time.sleep(0.01)
        pytest.fail((self.folder / "log").read_text())

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()
        (self.folder / "log").unlink(missing_ok=True)

    @contextmanager
    def client(self, url=""):
        with redis.Redis.from_url(url or self.url) as client:
            yield client


@pytest.fixture
def servers(tmp_path):
    """Makes servers that are not started yet, and ends them all."""
    if not shutil.which("redis-server"):
        said = "no redis-server on the PATH: `make test` installs Debian's where it may"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(said)
    made = []

    def make(*options):
        made.append(Server(tmp_path / f"redis {len(made)}", *options))
        return made[-1]

    yield make
    for server in made:
        server.kill()


@pytest.fixture
def server(servers):
    return servers().start()


@pytest.fixture
def step(tmp_path, server, monkeypatch):
    """A step of three queries; REDIS_URL is the server's."""
    monkeypatch.setenv("REDIS_URL", server.url)
    return index_step(tmp_path, ["a.jpg", "flight 1/b.jpg", "caf\udce9/ö.jpg"])


def index_step(tmp_path, queries, weight="vits16", run="demo"):
    about = {"dataset": "few", "weight": weight, "configuration": "scale1", "question": "data-data"}
    step = start_step(tmp_path / "exports" / run, "03_index", about, {"direction": "data-data"})
    hits = [
        {"rank": 0, "id": "x/caf\udce9.jpg", "path": "x/caf\udce9.jpg", "score": 0.93, "accepted": True},
        {"rank": 1, "id": "ö.jpg", "path": "ö.jpg", "score": -0.5, "accepted": False},
    ]
    about = {"weight": weight, "variant": "raw", "direction": "data-data", "k": 10}
    timing = {"embed": 1.0, "search": 0.2, "total": 1.2}
    rows = [{"query": query, **about, "hits": hits, "timing_ms": timing} for query in queries]
    rows[0]["hits"] = []
    index = {"backend": "faiss-cpu", "dimension": 384, "index_build_ms": 12.3}
    write_json(step.folder / "results.json", {**about, **index, "queries": rows})
    return step


def kept(client):
    """The messages of the run demo that the server holds, by their keys."""
    names = sorted({*client.keys("imatch:v1:demo:*")} - {EVENTS.encode()})
    return dict(zip(names, client.mget(names) if names else [], strict=True))


def key(query, run="demo"):
    return os.fsencode(f"imatch:v1:{run}:{query}")


def queries_of(events):
    return [fields[b"query"] for _, fields in events]


def some(n, text=b"{}"):
    return [(f"{i:04d}.jpg", text) for i in range(n)]


# --- what consumers see


def test_every_message_fits_the_schema_and_says_what_was_found(step, server):
    said = send(step, ttl=TTL)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    results = read_json(step.folder / "results.json")
    with server.client() as client:
        for row in results["queries"]:
            got = json.loads(client.get(key(row["query"])).decode())
            jsonschema.validate(got, SCHEMA)
            assert (got["encoder"], got["dim"], got["topk"], got["timing_ms"]) == ("vits16", 384, 10, row["timing_ms"])
            assert [(hit["path"], hit["score"]) for hit in got["results"]] == [
                (hit["path"], hit["score"]) for hit in row["hits"]
            ]
        assert got["results"][0]["filename"] == "caf\udce9.jpg"
        for query in results["queries"]:
            assert TTL - 60 < client.ttl(key(query["query"])) <= TTL
        assert TTL - 60 < client.ttl(EVENTS) <= TTL
        assert kept(client) == {key(row["query"]): message(results, row) for row in results["queries"]}
    assert said == f"3 messages at imatch:v1:demo:* on 127.0.0.1:{server.port}/0"
    assert read_json(step.folder / "sent.json") == {"run": "demo", "messages": 3, "acknowledged": True}


def test_a_message_is_these_bytes():
    results = {"weight": "vits16", "backend": "faiss-cpu", "dimension": 384, "k": 2, "index_build_ms": 12.3}
    hit = {"rank": 0, "id": "x/caf\udce9.jpg", "path": "x/caf\udce9 ö.jpg", "score": 0.93, "accepted": True}
    assert (
        message(results, {"hits": [hit], "timing_ms": {"embed": 1.0, "search": 0.2, "total": 1.2, "more": 3}})
        == (
            '{"encoder":"vits16","backend":"faiss-cpu","dim":384,"metric":"ip","topk":2,'
            '"timing_ms":{"embed":1.0,"search":0.2,"total":1.2},'
            '"results":[{"rank":0,"path":"x/caf\\udce9 ö.jpg","filename":"caf\\udce9 ö.jpg","score":0.93}],'
            '"index_build_ms":12.3}'
        ).encode()
    )


@pytest.mark.parametrize(
    "wrong",
    [{"metric": "l2"}, {"more": 1}, {"backend": "annoy"}, {"dim": 0}, {"timing_ms": {"total": 1}}, {"results": [{}]}],
    ids=str,
)
def test_the_schema_refuses_other_messages(wrong):
    results = {"weight": "sift", "backend": "faiss-gpu", "dimension": 1, "k": 1, "index_build_ms": 0}
    right = json.loads(message(results, {"hits": [], "timing_ms": dict.fromkeys(("embed", "search", "total"), 0)}))
    jsonschema.validate(right, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**right, **wrong}, SCHEMA)
    for name in right:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({key: value for key, value in right.items() if key != name}, SCHEMA)


def test_one_event_a_query_with_the_key_of_its_message(step, server):
    send(step, ttl=TTL)
    with server.client() as client:
        events = client.xrange(EVENTS)
        assert queries_of(events) == [b"a.jpg", b"flight 1/b.jpg", b"caf\xe9/\xc3\xb6.jpg"]
        for _, fields in events:
            assert fields[b"key"] == b"imatch:v1:demo:" + fields[b"query"]
            assert client.exists(fields[b"key"])


def test_again_is_the_same_messages_which_live_longer(step, server):
    send(step, ttl=10)
    with server.client() as client:
        before = kept(client)
        assert send(step, ttl=TTL).startswith("3 messages at ")
        assert kept(client) == before
        assert queries_of(client.xrange(EVENTS)) == [b"a.jpg", b"flight 1/b.jpg", b"caf\xe9/\xc3\xb6.jpg"] * 2
        for name in (*before, EVENTS):
            assert TTL - 60 < client.ttl(name) <= TTL


def test_a_message_that_changed_replaces_the_one_before(server):
    sink = Redis(server.url, TTL, batch=2)
    assert list(sink("demo", some(5))) == [2, 2, 1]
    changed = [*some(4), ("0004.jpg", b'{"other":1}'), ("0005.jpg", b"{}")]
    assert list(sink("demo", changed)) == [2, 2, 2]
    with server.client() as client:
        assert kept(client) == {key(query): payload for query, payload in changed}
        assert queries_of(client.xrange(EVENTS))[5:] == [os.fsencode(query) for query, _ in changed]
        assert 0 < client.ttl(key("0004.jpg")) <= TTL


def test_whoever_reads_an_event_finds_its_message(server):
    """Someone who reads the stream while the sender writes."""
    messages, seen = some(3000), 0
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        sending, last = pool.submit(lambda: list(Redis(server.url, TTL)("demo", messages))), "0"
        while seen < len(messages):
            for _, events in client.xread({EVENTS: last}, count=100, block=10_000):
                assert None not in client.mget([fields[b"key"] for _, fields in events])
                seen, last = seen + len(events), events[-1][0]
        assert sum(sending.result()) == len(messages)


def test_runs_have_streams_of_their_own(server):
    for run in ("one", "two"):
        assert list(Redis(server.url, TTL)(run, some(3))) == [3]
    with server.client() as client:
        assert client.xlen("imatch:v1:one:events") == client.xlen("imatch:v1:two:events") == 3


# --- Redis stops, or the sender


def test_a_server_that_came_back_without_what_it_had_is_found_out(servers):
    server = servers("--appendonly", "no").start()
    sending = Redis(server.url, TTL, batch=10)("demo", some(30))
    assert next(sending) == 10
    server.kill()
    server.start()
    with pytest.raises(RedisError, match="10 of 30 messages are gone again, evicted, expired or lost"):
        list(sending)


def test_killed_between_batches_and_started_again(server):
    sink, messages = Redis(server.url, TTL, batch=10), some(200)
    sending = sink("demo", messages)
    assert next(sending) == 10
    server.kill()
    with pytest.raises(RedisError, match=f"Redis at 127.0.0.1:{server.port}/0: .*start it"):
        list(sending)
    server.start()
    with server.client() as client:
        assert kept(client) == {key(query): payload for query, payload in messages[:10]}
        list(sink("demo", messages))
        assert kept(client) == {key(query): payload for query, payload in messages}
        assert {*queries_of(client.xrange(EVENTS))} == {os.fsencode(query) for query, _ in messages}


def everything_is_there(client, step):
    """Every query's message with its bytes, and at least one event each."""
    results = read_json(step.folder / "results.json")
    assert kept(client) == {key(row["query"]): message(results, row) for row in results["queries"]}
    assert {*queries_of(client.xrange(EVENTS))} == {os.fsencode(row["query"]) for row in results["queries"]}
    assert read_json(step.folder / "sent.json") == {
        "run": "demo",
        "messages": len(results["queries"]),
        "acknowledged": True,
    }


@pytest.mark.parametrize("keeps", ["yes", "no"])
def test_redis_killed_in_the_middle_costs_nothing(servers, tmp_path, monkeypatch, keeps):
    server = servers("--appendonly", keeps).start()
    monkeypatch.setenv("REDIS_URL", server.url)
    step = index_step(tmp_path, [f"{i:04d}.jpg" for i in range(2600)])
    progress = compute.progress

    def kill_after_the_first(items, *about):
        for i, item in enumerate(progress(items, *about)):
            if i == 0:
                server.kill()
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(compute, "progress", kill_after_the_first)
        with pytest.warns(ImatchWarning, match=r"2600 messages wait: `imatch send .*03_index"):
            assert send(step, ttl=TTL) == "2600 messages wait"
    assert not read_json(step.folder / "sent.json")["acknowledged"]
    server.start()
    with server.client() as client:
        assert len(kept(client)) == (500 if keeps == "yes" else 0)  # of those that were acknowledged
        assert send(step, ttl=TTL).startswith("2600 messages at ")
        everything_is_there(client, step)


def test_a_sender_killed_in_the_middle_costs_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setenv("REDIS_URL", server.url)
    step = index_step(tmp_path, [f"{i:04d}.jpg" for i in range(2600)])
    code = f"""
        import os, signal, pathlib
        from imatch.core import compute
        from imatch.core.step import open_step
        from imatch.steps.sending import send
        compute.progress = lambda items, *_: (os.kill(os.getpid(), signal.SIGKILL) for _ in items)
        send(open_step(pathlib.Path({str(step.folder)!r}), finished=False), ttl=100)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -9
    assert not read_json(step.folder / "sent.json")["acknowledged"]
    with server.client() as client:
        assert len(kept(client)) == 500
        assert send(step, ttl=TTL).startswith("2600 messages at ")
        everything_is_there(client, step)


@pytest.mark.parametrize("seen", [1, 700, 2300])
def test_a_sender_killed_at_any_moment_costs_nothing(server, tmp_path, monkeypatch, seen):
    """Not between two batches, as above, but once so many events are there."""
    monkeypatch.setenv("REDIS_URL", server.url)
    step = index_step(tmp_path, [f"{i:04d}.jpg" for i in range(5000)])
    code = f"""
        import pathlib
        from imatch.core.step import open_step
        from imatch.steps.sending import send
        send(open_step(pathlib.Path({str(step.folder)!r}), finished=False), ttl=100)
    """
    with server.client() as client, subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)]) as sender:
        while client.xlen(EVENTS) < seen:
            assert sender.poll() in (None, 0)
        sender.kill()
        sender.wait()
        assert send(step, ttl=TTL).startswith("5000 messages at ")
        everything_is_there(client, step)


def test_absent_redis_is_a_warning_that_names_a_command_that_sends_all(servers, tmp_path, monkeypatch, capsys):
    server = servers()
    monkeypatch.setenv("REDIS_URL", server.url)
    step = index_step(tmp_path, ["a.jpg", "b.jpg"])
    step.finish({})
    with pytest.warns(ImatchWarning, match="Connection refused.* 2 messages wait") as warned:
        send(step, ttl=TTL)
    named = shlex.split(str(warned[0].message).split("`")[1])
    assert named[:2] == ["imatch", "send"]
    monkeypatch.setattr(sys, "argv", named)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert "2 messages wait" in capsys.readouterr().err
    server.start()
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert "2 messages at imatch:v1:demo:* on " in capsys.readouterr().out
    with server.client() as client:
        everything_is_there(client, step)
        assert TTL - 60 < client.ttl(key("a.jpg")) <= TTL


def test_what_redis_refuses_waits(server, step):
    with server.client() as client:
        client.config_set("maxmemory", 1)
        with pytest.warns(ImatchWarning, match=r"raise its maxmemory.* 3 messages wait"):
            send(step, ttl=TTL)
        assert client.dbsize() == 0
        client.config_set("maxmemory", 0)
        send(step, ttl=TTL)
        everything_is_there(client, step)


def test_a_full_server_keeps_no_event_without_its_message(server, tmp_path, monkeypatch):
    """It fills up in the middle of a batch: that batch is there as a whole or not at all."""
    monkeypatch.setenv("REDIS_URL", server.url)
    step = index_step(tmp_path, [f"{i:04d}.jpg" for i in range(3000)])
    with server.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 2**19)
        with pytest.warns(ImatchWarning, match=r"raise its maxmemory.* 3000 messages wait"):
            send(step, ttl=TTL)
        client.config_set("maxmemory", 0)
        named = [fields[b"key"] for _, fields in client.xrange("imatch:v1:demo:events")]
        assert len(named) == len({*named}) == client.exists(*named) < 3000 if named else client.dbsize() == 0
        other = index_step(tmp_path, ["0001.jpg"], weight="vitb16")
        with pytest.raises(ImatchError, match="search in another run"):  # its messages would take the first one's place
            send(other, ttl=TTL)
        send(step, ttl=TTL)
        everything_is_there(client, step)


def test_a_user_needs_seven_commands(server, step, monkeypatch):
    monkeypatch.setenv("REDIS_URL", server.url.replace("://", "://sender:s3same@"))
    with server.client() as client:
        allowed = ["ACL", "SETUSER", "sender", "on", ">s3same", "~imatch:v1:*", "+multi", "+exec", "+set", "+expire"]
        client.execute_command(*allowed)
        needs = r"needs multi, exec, set, expire, xadd, exists and xrange on imatch:v1:\*\. 3 messages wait"
        with pytest.warns(ImatchWarning, match=needs):
            send(step, ttl=TTL)
        assert client.dbsize() == 0
        client.execute_command(*allowed, "+xadd")
        with pytest.warns(ImatchWarning, match=needs):  # who may not look does not say that they are there
            send(step, ttl=TTL)
        client.execute_command(*allowed, "+xadd", "+exists", "+xrange")
        send(step, ttl=TTL)
        everything_is_there(client, step)


def test_a_redis_that_evicts_is_named_and_what_is_gone_was_not_sent(servers, tmp_path, monkeypatch, capsys):
    server = servers("--maxmemory", "100mb", "--maxmemory-policy", "volatile-ttl").start()
    monkeypatch.setenv("REDIS_URL", server.url)
    (step := index_step(tmp_path, ["a.jpg", "b.jpg"])).finish({})
    assert command("send", step.folder) == 0
    out, err = capsys.readouterr()
    assert "2 messages at imatch:v1:demo:* on " in out
    assert "set its maxmemory-policy, volatile-ttl, to noeviction" in err
    sink = Redis(server.url, TTL, batch=2)
    with server.client() as client:
        everything_is_there(client, step)
        client.flushall()
        for room, said in ((2**21, "while this was sent it removed 1 keys of other runs or programs"), (2**30, "")):
            sending = sink("demo", some(4))
            with pytest.warns(ImatchWarning, match="when its memory is full, it removes messages"):
                assert next(sending) == 2
            client.set("other", b"." * 2**22, ex=60)
            client.config_set("maxmemory", max(1, client.info()["used_memory"] - room))
            while client.exists("other") or (not said and kept(client)):
                pass
            client.config_set("maxmemory", "100mb")
            if said:
                with pytest.warns(ImatchWarning, match=said):
                    assert list(sending) == [2]
        with pytest.raises(RedisError, match="2 of 4 messages are gone again, evicted"):
            list(sending)


def test_a_stream_that_is_gone_is_no_event_that_was_sent(server):
    sending = Redis(server.url, TTL, batch=2)("demo", some(5))
    next(sending)
    with server.client() as client:
        client.delete(EVENTS)
    with pytest.raises(RedisError, match="events of the messages are gone again"):
        list(sending)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["--cluster-enabled", "yes"], "cluster"),
        (["--replicaof", "127.0.0.1 1"], "replica"),
        (["--sentinel"], "sentinel"),
    ],
    ids=str,
)
def test_what_is_no_single_primary_is_refused_before_anything_is_sent(servers, options, kind):
    server = servers(*options)
    if kind == "sentinel":
        (server.folder / "sentinel.conf").touch()
        server.config = [str(server.folder / "sentinel.conf")]
    server.options += ("--cluster-port", str(server.port - 10000)) if kind == "cluster" else ()
    server.start()
    with pytest.raises(RedisError, match=f"it is a {kind}: imatch sends to one Redis, a primary"):
        list(Redis(server.url, TTL)("demo", some(1)))


REFUSED = {
    "NOAUTH Authentication required.": "correct the user and password in REDIS_URL",
    "WRONGPASS invalid username-password pair or user is disabled.": "correct the user and password in REDIS_URL",
    "MOVED 3999 127.0.0.1:6381": "give the URL of such a one",
    "CROSSSLOT Keys in request don't hash to the same slot": "give the URL of such a one",
    "CLUSTERDOWN Hash slot not served": "give the URL of such a one",
    "READONLY You can't write against a read only replica.": "give the URL of such a one",
    "MISCONF Redis is configured to save RDB snapshots, but it is unable to persist": "free some space there",
    "NOREPLICAS Not enough good replicas to write.": "wait until its replicas are back",
    "OOM command not allowed when used memory > 'maxmemory'.": "raise its maxmemory",
    "BUSY Redis is busy running a script.": "end it with SCRIPT KILL",
    "LOADING Redis is loading the dataset in memory": "wait until it has loaded",
    "ERR max number of clients reached": "raise its maxclients",
    "ERR DB index is out of range": "correct the number of the database",
    "WRONGTYPE Operation against a key holding the wrong kind of value": "a run of another name",
    "ERR unknown command 'MULTI'": "must be Redis 7.0 or newer",
}


@pytest.mark.parametrize("said", REFUSED, ids=lambda said: said.split()[0])
def test_what_a_server_says_comes_with_a_remedy(said):
    class Answer(socketserver.StreamRequestHandler):
        def handle(self):
            while count := self.rfile.readline():
                words = [(self.rfile.readline(), self.rfile.readline())[1].strip() for _ in range(int(count[1:]))]
                greeting = words[0] in (b"HELLO", b"CLIENT", b"INFO") and "AUTH" not in said and "DB" not in said
                self.wfile.write(b"+OK\r\n" if greeting else f"-{said}\r\n".encode())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as fake, ThreadPoolExecutor(1) as pool:
        pool.submit(fake.serve_forever, 0.01)
        try:
            with pytest.raises(RedisError, match=re.escape(REFUSED[said])) as caught:
                list(Redis(f"redis://:s3same@127.0.0.1:{fake.server_address[1]}/0?protocol=2", TTL)("demo", some(1)))
        finally:
            fake.shutdown()
    assert said.split(maxsplit=1)[1].rstrip(".") in str(caught.value)
    assert "s3same" not in str(caught.value)
    assert "\n" not in str(caught.value)


# --- two steps of one run


def test_two_steps_with_the_same_queries_are_refused(server, tmp_path, monkeypatch):
    monkeypatch.setenv("REDIS_URL", server.url)
    first = index_step(tmp_path, ["a.jpg", "b.jpg"])
    send(first, ttl=TTL)
    second = index_step(tmp_path, ["b.jpg", "c.jpg"], weight="vitb16")
    with pytest.raises(ImatchError, match=r"1 queries of .*vitb16.*such as b\.jpg.*; search in another run"):
        send(second, ttl=TTL)
    assert not (second.folder / "sent.json").exists()
    with server.client() as client:
        everything_is_there(client, first)


def test_a_step_that_waits_keeps_its_place(servers, tmp_path, monkeypatch):
    server = servers()
    monkeypatch.setenv("REDIS_URL", server.url)
    first = index_step(tmp_path, ["a.jpg", "b.jpg"])
    with pytest.warns(ImatchWarning, match="2 messages wait"):
        send(first, ttl=TTL)
    second = index_step(tmp_path, ["b.jpg", "c.jpg"], weight="vitb16")
    with pytest.raises(ImatchError, match=r"1 queries of .*vitb16.*such as b\.jpg.*; search in another run"):
        send(second, ttl=TTL)
    server.start()
    send(first, ttl=TTL)
    with server.client() as client:
        everything_is_there(client, first)


def test_other_queries_and_other_runs_are_not_refused(server, step, tmp_path):
    send(step, ttl=TTL)
    assert send(index_step(tmp_path, ["other.jpg"], weight="vitb16"), ttl=TTL).startswith(
        "1 messages at imatch:v1:demo"
    )
    assert send(index_step(tmp_path, ["a.jpg"], run="again"), ttl=TTL).startswith("1 messages at imatch:v1:again:* on")
    with server.client() as client:
        assert client.xlen(EVENTS) == 4


# --- URLs, passwords, TLS

PASSWORD = "s3same/öpen:@?#"


def with_password(server, password=PASSWORD):
    return server.url.replace("://", f"://:{quote(password, safe='')}@")


@pytest.mark.parametrize("password", [PASSWORD, "wr0ng/öne"])
def test_a_password_is_nowhere(servers, tmp_path, monkeypatch, capfd, password):
    server = servers("--requirepass", PASSWORD).start()
    monkeypatch.setenv("REDIS_URL", with_password(server, password))
    step = index_step(tmp_path, ["a.jpg"])
    said = ""
    if password == PASSWORD:
        said += send(step, ttl=TTL)
        with server.client(with_password(server)) as client:
            assert client.xlen(EVENTS) == 1
        server.kill()
    with pytest.warns(ImatchWarning) as warned:
        said += send(step, ttl=TTL)
    said += "".join(str(warning.message) for warning in warned) + "".join(capfd.readouterr())
    assert "correct the user and password in REDIS_URL" in said or password == PASSWORD
    with pytest.raises(RedisError) as caught:
        list(Redis(with_password(server, password), TTL)("demo", some(1)))
    said += "".join(traceback.format_exception(caught.value)) + repr(Redis(with_password(server, password), TTL))
    for part in (password, quote(password, safe=""), password[:5], password[-3:]):
        assert part not in said
        for path in (path for path in (tmp_path / "exports").rglob("*") if path.is_file()):
            assert part.encode() not in path.read_bytes(), path


def test_a_server_that_repeats_what_it_was_sent_is_not_repeated(servers):
    long = "s3same" * 30  # of which the server repeats a part
    server = servers("--requirepass", long, "--rename-command", "HELLO", "", "--rename-command", "AUTH", "").start()
    for user in ("", "s0meone"):
        url = server.url.replace("://", f"://{user}:{long}@")
        with pytest.raises(RedisError, match="unknown command") as caught:
            list(Redis(url, TTL)("demo", some(1)))
        assert "s3same" not in "".join(traceback.format_exception(caught.value))
        assert "s0meone" not in str(caught.value)


def test_something_else_that_repeats_what_it_was_sent_is_not_repeated():
    def answer(listening):
        connection, _ = listening.accept()
        with connection:
            connection.recv(10_000)
            connection.sendall(b"-ERR s0meone:s3same are no words of mine\r\n" * 9)

    with socket.socket() as listening, ThreadPoolExecutor(1) as pool:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        pool.submit(answer, listening)
        url = f"redis://s0meone:s3same@127.0.0.1:{listening.getsockname()[1]}/0"
        with pytest.raises(RedisError, match=r"no words of mine") as caught:
            list(Redis(url, TTL)("demo", some(1)))
    said = "".join(traceback.format_exception(caught.value))
    assert "s3same" not in said
    assert "s0meone" not in said


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3same/open@host:6379/0",
        "redis://:s3same#open@host:6379/0",
        "redis://me:33/s3same@host/0",
        "redis://me:33?s3same@host/0",
        "redis://:33#s3same@host/0",
        "redis://[s3same@host/0",
        "redis://:s3same@/0",
        "redis://:s3same@host/zero",
        "redis://:s3same@host:s3same/0",
        "redis://:s3same@host?soket_timeout=3",
        "redis://:s3same@host?socket_timeout=s3same",
        "unix://:s3/same@/tmp/s3same",
        "http://:s3same@host",
        "s3same",
        "",
    ],
)
def test_a_url_that_means_no_server_is_refused_without_being_repeated(url):
    with pytest.raises(ImatchError, match="REDIS_URL is no URL") as caught:
        Redis(url, TTL)
    said = "".join(traceback.format_exception(caught.value))
    assert "same" not in said.split("Error: ", 1)[1]


def test_timeouts_come_from_the_url():
    with socket.socket() as silent:  # accepts, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0?socket_timeout=0.05"
        with pytest.raises(RedisError, match=r"socket_timeout=60"):
            list(Redis(url, TTL)("demo", some(1)))


def test_tls(servers, tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    cert, secret = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", secret, "-out", cert]
    subprocess.run([*made.split(), *names], check=True, capture_output=True)
    files = ("--tls-cert-file", str(cert), "--tls-key-file", str(secret), "--tls-ca-cert-file", str(cert))
    server = servers("--requirepass", PASSWORD, "--tls-auth-clients", "no", *files)
    server.options += ("--tls-port", str(server.port), "--port", "0")
    server.start()
    url = with_password(server).replace("redis://", "rediss://")
    assert list(Redis(f"{url}?ssl_ca_certs={cert}", TTL)("demo", some(3))) == [3]
    with pytest.raises(RedisError, match=r"CERTIFICATE_VERIFY_FAILED.*\?ssl_ca_certs=FILE"):
        list(Redis(url, TTL)("demo", some(3)))
    with pytest.raises(RedisError, match="which begins with rediss:// for a server with TLS"):
        list(Redis(with_password(server), TTL)("demo", some(3)))


def test_without_url_or_redis_py_it_says_what_to_do(tmp_path, monkeypatch):
    step = index_step(tmp_path, ["a.jpg"])
    monkeypatch.delenv("REDIS_URL", raising=False)
    with pytest.raises(ImatchError, match="set REDIS_URL"):
        send(step, ttl=TTL)
    monkeypatch.setenv("REDIS_URL", "redis://localhost")
    with pytest.raises(ImatchError, match="ttl is 0 seconds"):
        send(step, ttl=0)
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "imatch.retrieval.redis")
    with pytest.raises(ImatchError, match=r"pip install -c constraints.txt -e '\.\[redis\]'"):
        send(step, ttl=TTL)


def test_importing_send_does_not_import_redis():
    code = "import imatch.export.outputs, imatch.steps.sending, sys; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
