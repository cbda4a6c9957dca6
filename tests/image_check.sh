#!/usr/bin/env bash
# Builds docker/Dockerfile without Docker and uses the image as README.md says: `make image-check`.
#
# buildah builds it as it is (chroot isolation), as root, on a stand-in for the official Python image: Debian 12 with its
# own Python 3.11, made by debootstrap and tagged as that image. podman and podman-compose then do what `docker compose`
# would with docker/compose*.yaml and a docker/.env. Where podman can run no container, that is said, and buildah starts the
# same verbs with the same mounts. What this cannot prove is a GPU, Docker itself, and the official images.
set -euo pipefail
cd "$(dirname "$0")/.."

variant=${FAISS:-gpu}
image=imatch files=compose.yaml
[ "$variant" = gpu ] || image=imatch-cpu files=compose.yaml:compose.cpu.yaml
work=${WORK:-/var/tmp/imatch-image-check} # 31 GB while it builds, then 9; kept for its stand-ins
base=docker.io/library/python:3.11-slim-bookworm
user=1234 # one that the image does not know, as a Linux host's may be
mkdir -p "$work"
run=$(mktemp --directory "$work/run.XXXX")
container='' composed=''
trap '[ -z "$composed" ] || compose down --volumes > /dev/null 2>&1
    [ -z "$container" ] || buildah rm "$container" > /dev/null
    rm -rf "$run"' EXIT
export PATH=$PWD/.venv/bin:$PATH CONTAINERS_STORAGE_CONF=$run/storage.conf CONTAINERS_CONF=$run/containers.conf
storage() { # DRIVER
    printf '[storage]\ndriver = "%s"\ngraphroot = "%s"\nrunroot = "%s"\n' "$1" "$work/storage" "$work/runroot" > "$run/storage.conf"
}
# limits that a root without CAP_SYS_RESOURCE may set, and a runtime for cgroups of either version, or both
cat > "$run/containers.conf" << END
[containers]
default_ulimits = ["nofile=$(ulimit -Hn):$(ulimit -Hn)", "nproc=4096:4096"]
[engine]
runtime = "runc"
[network]
network_config_dir = "$work/networks"
END
storage overlay
buildah images > /dev/null 2>&1 || storage vfs

say() { printf '\n== %s\n' "$*"; }
fail() {
    echo "FAILED: $*" >&2
    exit 1
}

say "stand-in for $base"
if ! buildah inspect --type image "$base" > "$run/inspect" 2> /dev/null; then
    rm -rf "$work/base"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/base" > "$run/debootstrap" ||
        { tail "$run/debootstrap" && exit 1; }
    ln -s /usr/bin/python3 "$work/base/usr/local/bin/python"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$work/base" / > /dev/null
    buildah config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    buildah commit --quiet --rm "$container" "$base" > /dev/null
    container=''
    rm -rf "$work/base"
fi

say "build, FAISS=$variant"
# this machine's way to a package index, mounted for the build and in no layer
python3 -m pip config list | sed -nE "s/^(global|:env:)\.(cert|index-url|extra-index-url)=/\2 = /p" | tr -d "'" |
    sort --unique --key 1,1 | sed '1i [global]' > "$run/pip.conf"
mounts=(--volume "$run/pip.conf:/etc/pip.conf:ro" --volume /etc/ssl/certs:/etc/ssl/certs:ro)
while read -r folder; do
    mounts+=(--volume "$folder:$folder:ro")
done < <(grep -o 'file:///[^/ ]*/[^/ ]*' "$run/pip.conf" | cut -c8-)
[ "$variant" = gpu ] || mounts+=(--build-arg "TORCH_CPU=${TORCH_CPU:-https://download.pytorch.org/whl/cpu}")
buildah build --isolation chroot --pull-never --format docker --layers=false "${mounts[@]}" \
    --build-arg "FAISS=$variant" --file docker/Dockerfile --tag "$image" . > "$run/build" 2>&1 ||
    { tail -30 "$run/build" && exit 1; }
buildah images --format '{{.Name}} {{.Size}}' "$image"

say "folders as docker/.env names them, of user $user"
photographs="$run/my photographs"
mkdir "$run"/{project,references,weights,dinov3,exports} "$photographs"
git ls-files | grep -v ^tests/benchmarks | tar --create --files-from - | tar --extract --directory "$run/project"
chown -R "$user:$user" "$run"/*/
chmod 755 "$run"
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
setting() { # NAME VALUE: in docker/.env
    sed -i "s|^$1=[^ ]*|$1=$2|" "$run/project/docker/.env"
}
cp docker/.env.example "$run/project/docker/.env"
setting HOST_UID "$user"
setting HOST_GID "$user"
setting DATASET_HOST "'$photographs'"
setting EXPORT_HOST "$run/exports"
setting WEIGHTS_HOST "$run/weights"
setting REFERENCE_HOST "$run/references"
setting CODE_HOST "$run/dinov3"
setting JUPYTER_PORT "$port"
compose() { # what `docker compose ...` does in docker/; podman-compose reads COMPOSE_FILE in the environment alone
    (cd "$run/project/docker" && COMPOSE_FILE=$files podman-compose "$@")
}
if podman run --rm "$base" python --version > "$run/podman" 2>&1 && podman-compose --version >> "$run/podman" 2>&1; then
    say "by podman-compose: $files"
    composed=yes
    inside() { # VERB ...
        compose run --rm app "$@"
    }
    start() {
        setting JUPYTER_TOKEN "${token:-}"
        compose up
    }
else
    say "SKIPPED: docker/compose*.yaml, for podman and podman-compose cannot run here; by buildah instead"
    cat "$run/podman"
    container=$(buildah from --pull-never "$image")
    inside() {
        buildah run --isolation chroot --user "$user:$user" --workingdir /workspace/project --env "JUPYTER_PORT=$port" \
            --env "JUPYTER_TOKEN=${token:-}" --volume "$run/project:/workspace/project" \
            --volume "$photographs:/opt/datasets:ro" --volume "$run/references:/opt/references" \
            --volume "$run/weights:/workspace/weights:ro" --volume "$run/dinov3:/workspace/dinov3:ro" \
            --volume "$run/exports:/exports" "$container" -- sh /usr/local/bin/entrypoint.sh "$@"
    }
    start() {
        inside lab
    }
fi
status() { # QUERY: what JupyterLab answers
    curl --silent --output /dev/null --write-out '%{http_code}' "http://127.0.0.1:$port/api/contents$1" || true
}
lab() { # starts it and waits for its link
    start > "$run/lab" 2>&1 &
    started=$!
    for _ in $(seq 120); do
        [ "$(status '')" = 000 ] || return 0
        sleep 1
    done
    cat "$run/lab" && fail "no JupyterLab on port $port"
}
end_lab() {
    curl --silent --request POST --header "Authorization: token $1" "http://127.0.0.1:$port/api/shutdown"
    wait "$started" || true
}

say "doctor --cpu"
inside doctor --cpu
say "doctor finds no GPU, and says so by its exit code 3"
code=0
inside doctor || code=$?
[ "$code" -eq 3 ] || fail "its exit code is $code"

say "photographs and weights are read only"
inside shell -c '! touch /opt/datasets/x && ! touch /workspace/weights/x && touch /exports/x && rm /exports/x'

say "JupyterLab opens without a GPU; a token is made, and asked for"
lab
cat "$run/lab"
made=$(grep -oE 'token=[0-9a-f]{20,}' "$run/lab" | head -1 | cut -d= -f2)
[ "$(status '')" = 403 ] || fail "it answers without a token: $(status '')"
[ "$(status "?token=$made")" = 200 ] || fail "it does not answer with its token: $(status "?token=$made")"
if [ -n "$composed" ]; then
    podman healthcheck run imatch_app_1 || fail "its health check does not pass"
    podman port imatch_app_1 | grep -v " 127.0.0.1:" && fail "others can reach it"
fi
end_lab "$made"

say "JupyterLab with a token that is given"
token=given-$RANDOM-$RANDOM
lab
[ "$(status '')" = 403 ] || fail "it answers without its token"
[ "$(status "?token=$token")" = 200 ] || fail "it does not answer with its token"
end_lab "$token"
grep -q "$token" "$run/lab" && fail "its log has the token"

say "a batch"
inside run params/demo.yaml -p weight sift -p kind isometric -p angles '[0, 90]' -p crops '[0.75]' -p candidates 1 \
    > "$run/batch" 2>&1 || { tail -30 "$run/batch" && exit 1; }
tail -4 "$run/batch"
find "$run/exports" "$run/project" ! -user "$user" ! -path "$run/project/docker/.env" | grep . && fail "these belong to somebody else"
grep -rlE --exclude .env "$token|$made" "$run/exports" "$run/project" && fail "these have a token"

if [ -n "$composed" ]; then
    say "Redis: a stand-in for the official image, from Debian's package; a password is asked for"
    redis=docker.io/library/redis:7-bookworm
    if ! buildah inspect --type image "$redis" > "$run/inspect" 2> /dev/null; then
        container=$(buildah from --pull-never "$base")
        buildah run --isolation chroot "$container" -- sh -c 'apt-get -qq update && apt-get -qq install --yes \
            --no-install-recommends redis-server && install --directory --owner redis --group redis /data' > "$run/redis" 2>&1 ||
            { tail "$run/redis" && exit 1; }
        buildah config --volume /data --workingdir /data "$container"
        buildah commit --quiet --rm "$container" "$redis" > /dev/null
        container=''
    fi
    compose down > /dev/null 2>&1
    files+=:compose.redis.yaml
    compose up > "$run/up" 2>&1 && fail "it starts without a REDIS_PASSWORD"
    grep "set it in .env" "$run/up" || { cat "$run/up" && exit 1; }
    password=given$RANDOM$RANDOM
    setting REDIS_PASSWORD "$password"
    inside run params/demo.yaml -p weight sift -p kind isometric -p angles '[0, 90]' -p crops '[0.75]' -p candidates 1 \
        -p send.to redis > "$run/batch" 2>&1 || { tail -30 "$run/batch" && exit 1; }
    grep "messages at imatch:v1:demo" "$run/batch" || fail "nothing was sent"
    podman healthcheck run imatch_redis_1 || fail "its health check does not pass"
    podman exec imatch_redis_1 redis-cli dbsize | grep NOAUTH || fail "it answers without its password"
    grep -rl "$password" "$run/exports" "$run/batch" && fail "these have the password"

    say "a folder that is not there is said, and not made"
    compose down > /dev/null 2>&1
    rmdir "$run/references"
    compose up > "$run/up" 2>&1 && fail "it starts all the same"
    grep "bind source path does not exist" "$run/up" || { cat "$run/up" && exit 1; }
    [ ! -e "$run/references" ] || fail "it was made"
    compose down --volumes > /dev/null 2>&1
    podman ps --all --quiet | grep . && fail "compose down leaves containers"
    composed=''
fi

say "no layer has a token or this machine's pip.conf"
buildah inspect --type image "$image" | grep -E "$token|$made|extra-index" && fail "the image's history has them"
[ -n "$container" ] || container=$(buildah from --pull-never "$image")
buildah run --isolation chroot "$container" -- test ! -s /etc/pip.conf || fail "/etc/pip.conf is in the image"
say "all of it holds"
