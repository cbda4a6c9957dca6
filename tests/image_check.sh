#!/usr/bin/env bash
# Builds docker/Dockerfile without a container engine and uses the image as compose.yaml would: `make image-check`.
#
# buildah builds it as it is (chroot isolation, vfs storage), as root, on a stand-in for the official Python image: Debian
# 12 with its own Python 3.11, made by debootstrap and tagged as that image. What this cannot prove is a GPU, Docker
# itself, and that official image.
set -euo pipefail
cd "$(dirname "$0")/.."

variant=${FAISS:-gpu}
work=${WORK:-/var/tmp/imatch-image-check} # 25 GB; kept, so that the stand-in is made once
base=docker.io/library/python:3.11-slim-bookworm
user=1234 # one that the image does not know, as a Linux host's may be
mkdir -p "$work"
run=$(mktemp --directory "$work/run.XXXX")
buildah=(buildah --storage-driver vfs --root "$work/storage" --runroot "$work/runroot")
container=''
trap '[ -z "$container" ] || "${buildah[@]}" rm "$container" > /dev/null; rm -rf "$run"' EXIT

say() { printf '\n== %s\n' "$*"; }
fail() {
    echo "FAILED: $*" >&2
    exit 1
}

say "stand-in for $base"
if ! "${buildah[@]}" inspect --type image "$base" > "$run/inspect" 2> /dev/null; then
    rm -rf "$work/base"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/base" > "$run/debootstrap" ||
        { tail "$run/debootstrap" && exit 1; }
    ln -s /usr/bin/python3 "$work/base/usr/local/bin/python"
    container=$("${buildah[@]}" from scratch)
    "${buildah[@]}" add --quiet "$container" "$work/base" / > /dev/null
    "${buildah[@]}" config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    "${buildah[@]}" commit --quiet --rm "$container" "$base" > /dev/null
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
"${buildah[@]}" build --isolation chroot --pull-never --format docker --layers=false "${mounts[@]}" \
    --build-arg "FAISS=$variant" --file docker/Dockerfile --tag imatch . > "$run/build" 2>&1 ||
    { tail -30 "$run/build" && exit 1; }
"${buildah[@]}" images --format '{{.Name}} {{.Size}}' imatch

say "folders as docker/.env names them, of user $user"
mkdir "$run"/{project,datasets,references,weights,dinov3,exports}
git ls-files | grep -v ^tests/benchmarks | tar --create --files-from - | tar --extract --directory "$run/project"
chown -R "$user:$user" "$run"/*/
chmod 755 "$run"
container=$("${buildah[@]}" from --pull-never imatch)
inside() { # VERB ...: what `docker compose run --rm app VERB ...` does
    "${buildah[@]}" run --isolation chroot --user "$user:$user" --workingdir /workspace/project --env "JUPYTER_PORT=$port" \
        --env "JUPYTER_TOKEN=${token:-}" --volume "$run/project:/workspace/project" --volume "$run/datasets:/opt/datasets:ro" \
        --volume "$run/references:/opt/references" --volume "$run/weights:/workspace/weights:ro" \
        --volume "$run/dinov3:/workspace/dinov3:ro" --volume "$run/exports:/exports" \
        "$container" -- sh /usr/local/bin/entrypoint.sh "$@"
}
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
status() { # QUERY: what JupyterLab answers
    curl --silent --output /dev/null --write-out '%{http_code}' "http://127.0.0.1:$port/api/contents$1" || true
}
lab() { # starts it and waits for its link
    inside lab > "$run/lab" 2>&1 &
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
end_lab "$made"

say "JupyterLab with a token that is given"
token=given-$RANDOM-$RANDOM
lab
[ "$(status '')" = 403 ] || fail "it answers without its token"
[ "$(status "?token=$token")" = 200 ] || fail "it does not answer with its token"
end_lab "$token"
grep -q "$token" "$run/lab" && fail "its log has the token"

say "a batch"
inside batch params/demo.yaml -p weight sift -p kind isometric -p angles '[0, 90]' -p crops '[0.75]' -p candidates 1 \
    > "$run/batch" 2>&1 || { tail -30 "$run/batch" && exit 1; }
tail -4 "$run/batch"
find "$run/exports" "$run/project" ! -user "$user" | grep . && fail "these belong to somebody else"
grep -rlE "$token|$made" "$run/exports" "$run/project" && fail "these have a token"

say "no layer has a token or this machine's pip.conf"
"${buildah[@]}" inspect imatch | grep -E "$token|$made|extra-index" && fail "the image's history has them"
"${buildah[@]}" run --isolation chroot "$container" -- test ! -s /etc/pip.conf || fail "/etc/pip.conf is in the image"
say "all of it holds"
