"""What can be held of the container without an engine. `make image-check` builds the image and uses it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import dotenv
import pytest
import yaml

from imatch.core import settings

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
COMPOSE = ["compose.yaml", "compose.cpu.yaml", "compose.redis.yaml"]
EXAMPLE = dotenv.dotenv_values(DOCKER / ".env.example")
MOUNTS = {  # variable -> root of the registry that its mount is, and whether it is read only
    "DATASET_HOST": ("DATASET_ROOT", True),
    "REFERENCE_HOST": ("REFERENCE_ROOT", False),
    "WEIGHTS_HOST": ("WEIGHTS_ROOT", True),
    "CODE_HOST": ("DINOV3_REPO", True),
    "EXPORT_HOST": ("EXPORT_ROOT", False),
}
TOKEN, PASSWORD = "token-of-the-test", "password-of-the-test"


def dockerfile():
    return (DOCKER / "Dockerfile").read_text()


def compose(tmp_path, env, *files):
    """What podman-compose makes of the compose files with a .env; it asks podman for its version and nothing else."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "podman").write_text("#!/bin/sh\necho podman version 4.3.1\n")
    (tmp_path / "bin" / "podman").chmod(0o755)
    (tmp_path / ".env").write_text(env)
    line = [BIN / "podman-compose", "--env-file", tmp_path / ".env"]
    for file in files or COMPOSE[:1]:
        line += ["-f", DOCKER / file]
    names = set(re.findall(r"\$\{(\w+)", "".join((DOCKER / file).read_text() for file in COMPOSE)))
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([*line, "config"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return yaml.safe_load(done.stdout)["services"]


def volumes(service):
    return {volume["target"]: volume for volume in service["volumes"]}


# --- linters ----------------------------------------------------------------------------------------------


def test_hadolint_is_clean():
    done = subprocess.run([BIN / "hadolint", DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck_is_clean():
    scripts = [DOCKER / "entrypoint.sh", ROOT / "tests" / "image_check.sh"]
    done = subprocess.run([BIN / "shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# --- the image --------------------------------------------------------------------------------------------


def test_the_image_needs_no_buildkit_runs_as_nobody_special_and_has_a_health_check():
    text = dockerfile()
    assert "<<" not in text
    assert not re.search(r"--(link|mount|chmod)\b|^# syntax", text, re.M)
    user = re.findall(r"^USER (\d+):\d+$", text, re.M)[-1]
    assert int(user) > 0
    assert re.search(r"^HEALTHCHECK ", text, re.M)
    assert not re.search(r"(TOKEN|PASSWORD|SECRET)\b", text.replace("JUPYTER_TOKEN", "TOKEN"))


def test_the_image_has_what_is_mounted_over_and_what_it_copies():
    text = dockerfile()
    for container, _ in settings.ROOTS.values():
        assert f"{container} " in text.replace("\\", " ")
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert "*" in ignored, "everything but what is named, so that no photograph, weight or .env gets into an image"
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored


def test_the_image_is_made_from_the_lock():
    installs = re.findall(r"pip install [^;&\n]*", dockerfile())
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in line for line in installs)
    project = (ROOT / "pyproject.toml").read_text()
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().split()}
    assert {"nvidia-cublas-cu12", "nvidia-cuda-runtime-cu12", "nvidia-curand-cu12"} <= pinned, "what faiss-gpu asks for"
    assert re.search(r'^gpu = \["faiss-gpu==', project, re.M)


def test_no_file_ends_its_lines_as_windows_does():
    assert "*.sh text eol=lf" in (ROOT / ".gitattributes").read_text()
    assert b"\r" not in (DOCKER / "entrypoint.sh").read_bytes()


# --- compose and .env -------------------------------------------------------------------------------------


def test_every_variable_of_compose_is_in_the_example_and_the_other_way_round():
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", "".join((DOCKER / file).read_text() for file in COMPOSE)))
    of_compose_itself = {"COMPOSE_FILE", "COMPOSE_PATH_SEPARATOR"}
    old = set(settings.REPLACED) - {"VIS_*"}
    assert used - old == set(EXAMPLE) - of_compose_itself
    assert old <= used, "passed on, for the doctor to say what stands for them"
    comments = "".join(line for line in (DOCKER / ".env.example").read_text().splitlines() if line.startswith("#"))
    assert all(name in comments for name in settings.REPLACED)
    assert "blocking the network" in comments


def test_every_mount_is_a_root_of_the_registry(tmp_path):
    hosts = {name: f"/host/{name}" for name in (*MOUNTS, "PROJECT_HOST")}
    app = compose(tmp_path, "".join(f"{name}={path}\n" for name, path in hosts.items()))["app"]
    found = volumes(app)
    assert {root for root, _ in MOUNTS.values()} == set(settings.ROOTS)
    for name, (root, read_only) in MOUNTS.items():
        volume = found.pop(settings.ROOTS[root][0])
        assert volume == {
            "type": "bind",
            "source": hosts[name],
            "target": settings.ROOTS[root][0],
            "bind": {"create_host_path": False},
            **({"read_only": True} if read_only else {}),
        }
    assert found.pop("/workspace/project")["source"] == hosts["PROJECT_HOST"]
    assert found == {"/home/imatch": {"type": "volume", "source": "home", "target": "/home/imatch"}}
    assert "WORKDIR /workspace/project" in dockerfile()
    assert "HOME=/home/imatch" in dockerfile()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"'D:\My Photos\survey'", r"D:\My Photos\survey"),
        (r"D:\My Photos\new 2026", r"D:\My Photos\new 2026"),
        ("D:/My Photos/survey", "D:/My Photos/survey"),
        (r"'D:\사진\2026년'", r"D:\사진\2026년"),
        ("/mnt/c/Users/Jo Kim/survey", "/mnt/c/Users/Jo Kim/survey"),
    ],
)
def test_paths_of_windows_arrive_as_they_are_written(tmp_path, written, meant):
    env = "".join(f"{name}={written}\n" for name in (*MOUNTS, "PROJECT_HOST"))
    app = compose(tmp_path, env)["app"]
    for target, volume in volumes(app).items():
        assert (volume["source"] == meant) == (target != "/home/imatch")


def test_the_example_as_it_is(tmp_path):
    app = compose(tmp_path, (DOCKER / ".env.example").read_text())["app"]
    assert app["gpus"] == "all"
    assert app["image"] == "imatch"
    assert app["user"] == "1000:1000"
    assert app["shm_size"]
    assert app["init"] is True
    assert app["ports"] == ["127.0.0.1:8888:8888"]
    assert app["environment"]["TZ"] == "UTC"
    assert app["environment"]["JUPYTER_TOKEN"] == "", "none is known before it is made"
    assert next(iter(volumes(app).values()))["source"] == ".."


def test_another_port_image_and_user(tmp_path):
    env = "JUPYTER_PORT=9999\nIMAGE_NAME=mine\nHOST_UID=1234\nHOST_GID=99\nTZ=Asia/Seoul\nIMG_ROOT=/old\n"
    app = compose(tmp_path, env)["app"]
    assert (app["ports"], app["image"], app["user"]) == (["127.0.0.1:9999:9999"], "mine", "1234:99")
    told = app["environment"]
    assert (told["JUPYTER_PORT"], told["TZ"], told["IMG_ROOT"]) == ("9999", "Asia/Seoul", "/old")


def test_without_a_gpu(tmp_path):
    app = compose(tmp_path, "", "compose.yaml", "compose.cpu.yaml")["app"]
    assert "gpus" not in app
    assert app["build"]["args"] == ["FAISS=cpu"]
    assert app["command"] == ["lab", "--cpu"]


def test_a_redis_wants_a_password_and_is_not_published(tmp_path):
    with pytest.raises(AssertionError, match="REDIS_PASSWORD"):
        compose(tmp_path, "", "compose.yaml", "compose.redis.yaml")
    shutil.rmtree(tmp_path / "bin")
    services = compose(tmp_path, "REDIS_PASSWORD=abc\n", "compose.yaml", "compose.redis.yaml")
    assert services["app"]["environment"]["REDIS_URL"] == "redis://:abc@redis:6379/0"
    assert "ports" not in services["redis"]
    assert "abc" not in json.dumps([services["redis"]["command"], services["redis"]["healthcheck"]])


@pytest.fixture
def redis_service(tmp_path):
    """The URL of the redis of compose.redis.yaml, started by its own command, on a free port."""
    if not shutil.which("redis-server"):
        pytest.skip("no redis-server on the PATH: `make test` installs Debian's where it may")
    command = yaml.safe_load((DOCKER / "compose.redis.yaml").read_text())["services"]["redis"]["command"]
    number = free_port()
    script = command[-1].replace("$$", "$").replace("redis-server -", f"redis-server - --port {number}")
    environment = {**os.environ, "REDIS_PASSWORD": PASSWORD}
    with (tmp_path / "redis.log").open("wb") as log:
        started = subprocess.Popen([*command[:-1], script], cwd=tmp_path, env=environment, stdout=log, stderr=log)
    wait(lambda: "Ready to accept" in (tmp_path / "redis.log").read_text(), started)
    assert PASSWORD not in Path(f"/proc/{started.pid}/cmdline").read_text()
    yield f"redis://:{PASSWORD}@127.0.0.1:{number}/0"
    started.terminate()
    assert started.wait(timeout=30) == 0, "docker stop ends it in order"
    assert PASSWORD not in (tmp_path / "redis.log").read_text()


# --- the container's verbs --------------------------------------------------------------------------------


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait(ready, started):
    for _ in range(1200):
        if ready():
            return
        assert started.poll() is None
        time.sleep(0.1)
    pytest.fail("nothing in two minutes")


@pytest.fixture
def project(tmp_path):
    """A folder as the container has it at /workspace/project."""
    folder = tmp_path / "project"
    for name in ("imatch", "notebooks", "params"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    return folder


def surroundings(project, **variables):
    kept = {name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "JUPYTER_TOKEN")}
    home = project.parent / "home"
    home.mkdir(exist_ok=True)
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(project), "HOME": str(home), **variables}


def verb(project, *arguments, **variables):
    line = ["sh", DOCKER / "entrypoint.sh", *arguments]
    environment = surroundings(project, **variables)
    return subprocess.run(line, cwd=project, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("given", "extra"), [("", {}), (TOKEN, {"JUPYTER_TOKEN": TOKEN})], ids=["made", "given"])
def test_jupyterlab_has_a_token_always(project, given, extra):
    number = free_port()
    # an empty variable is what compose hands on when no token is set
    environment = surroundings(project, **{"JUPYTER_PORT": str(number), "JUPYTER_TOKEN": "", **extra})
    if os.geteuid() == 0:  # Jupyter refuses root, whom the image has not
        (project.parent / "home" / ".jupyter").mkdir()
        (project.parent / "home" / ".jupyter" / "jupyter_server_config.json").write_text(
            '{"ServerApp": {"allow_root": true}}'
        )
    log = project.parent / "log"
    with log.open("wb") as output:
        line = ["sh", DOCKER / "entrypoint.sh", "lab", "--cpu"]
        lab = subprocess.Popen(line, cwd=project, env=environment, stdout=output, stderr=output)

    def status(query=""):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{number}/api/contents{query}") as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return None

    try:
        wait(lambda: status() and f"http://127.0.0.1:{number}/lab" in log.read_text(), lab)
        printed = log.read_text()
        token = given or re.search(rf"http://127\.0\.0\.1:{number}/lab\?token=([0-9a-f]{{40,}})", printed)[1]
        assert [status(), status("?token="), status("?token=x"), status(f"?token={token}")] == [403, 403, 403, 200]
    finally:
        lab.terminate()
        lab.wait(timeout=60)
    assert "OK   exports" in printed, "the doctor is asked first"
    assert not given or given not in log.read_text()
    assert (project / "data" / "demo" / "astronaut.png").is_file()


def test_a_verb_that_is_none_and_a_project_that_is_none(project, tmp_path):
    done = verb(project, "bach")
    assert (done.returncode, "No such command 'bach'" in done.stderr) == (2, True)
    done = verb(project, "batch", "params/demo.yaml")
    assert (done.returncode, "batch is run now" in done.stderr) == (2, True)
    (tmp_path / "empty").mkdir()
    done = verb(tmp_path / "empty", "doctor")
    assert (done.returncode, "set PROJECT_HOST" in done.stderr) == (1, True)


def test_no_notebook_step_or_log_has_the_token_or_the_password(project, few_photographs, tmp_path, redis_service):
    """A batch that sends to a Redis, by the container's verb: what it leaves and what it prints."""
    exports = tmp_path / "exports"
    recipe = tmp_path / "send.yaml"
    recipe.write_text(
        "notebooks: [01_embed, 03_index]\nparameters: {direction: data-data, send.to: redis, spot_check: 0}\n"
    )
    done = verb(
        project,
        *("run", str(recipe), "-p", "dataset", str(few_photographs)),
        REDIS_URL=redis_service,
        JUPYTER_TOKEN=TOKEN,
        EXPORT_ROOT=str(exports),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    written = [path for folder in (exports, project) for path in folder.rglob("*") if path.is_file()]
    assert {"notebook.ipynb", "step.json", "results.json"} <= {path.name for path in written}
    for secret in (TOKEN, PASSWORD):
        assert secret not in done.stdout + done.stderr
        assert not [path for path in written if secret.encode() in path.read_bytes()]
    import redis

    with redis.Redis.from_url(redis_service) as client:
        assert client.keys("imatch:v1:*"), "it was sent, so the password was used"


# --- around it --------------------------------------------------------------------------------------------


def test_vs_code_opens_the_same_service():
    text = (ROOT / ".devcontainer" / "devcontainer.json").read_text()
    told = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.M))
    (file,) = told["dockerComposeFile"]
    service = yaml.safe_load((ROOT / ".devcontainer" / file).resolve().read_text())["services"][told["service"]]
    assert told["workspaceFolder"] in {volume["target"] for volume in service["volumes"]}


def test_github_runs_what_ci_runs_and_builds_the_image():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yaml").read_text())["jobs"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert ".ci/run" in steps
    assert "docker compose build" in steps


def test_every_notebook_offers_the_doctor_first():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        first = json.loads(path.read_text())["cells"][0]
        assert "!imatch doctor" in "".join(first["source"]), path.name


def test_the_readme_names_every_folder():
    readme = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+_HOST)` \| `(/[\w/]+)` \|", readme, re.M))
    assert rows == {"PROJECT_HOST": "/workspace/project"} | {
        name: settings.ROOTS[root][0] for name, (root, _) in MOUNTS.items()
    }
    assert set(rows) == {name for name in EXAMPLE if name.endswith("_HOST")}
