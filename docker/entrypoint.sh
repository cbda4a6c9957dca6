#!/bin/sh
# What the container does: the command imatch, JupyterLab by default; `shell` is a shell.
set -eu

if ! [ -f imatch/__init__.py ]; then
    echo "no imatch in $PWD: set PROJECT_HOST in docker/.env to the folder of imatch that you cloned" >&2
    exit 1
fi
verb=${1:-lab}
[ $# -eq 0 ] || shift
case "$verb" in
shell) exec bash "$@" ;;
batch) echo "batch is run now: run FILE ..." >&2 && exit 2 ;;
# without a JUPYTER_TOKEN Jupyter makes one and prints the link with it
lab) set -- "$@" --ip=0.0.0.0 --no-browser --ServerApp.port_retries=0 ;;
run) imatch demo --photographs || echo "no demo photographs: data/ cannot be written to" ;;
esac
exec imatch "$verb" "$@"
