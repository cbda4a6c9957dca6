#!/bin/sh
# What the container does: the first argument says it.
set -eu

verb=${1:-lab}
[ $# -eq 0 ] || shift

if ! [ -f imatch/__init__.py ]; then
    echo "no imatch in $PWD: set PROJECT_HOST in docker/.env to the folder of imatch that you cloned" >&2
    exit 1
fi

demo() {
    python -m imatch.demo data/demo || echo "no demo photographs: data/ cannot be written to"
}

case "$verb" in
lab)
    # what it finds is said, and JupyterLab opens all the same: on the CPU, if torch cannot use a GPU (3)
    python -m imatch.doctor "$@" || case $? in
        3) export CUDA_VISIBLE_DEVICES='' && echo 'JupyterLab opens all the same, on the CPU.' ;;
        *) echo 'JupyterLab opens all the same.' ;;
    esac
    demo
    # without a JUPYTER_TOKEN Jupyter makes one and prints the link with it
    exec jupyter lab --ip=0.0.0.0 --no-browser --ServerApp.port_retries=0
    ;;
batch)
    demo
    exec python -m imatch.batch "$@"
    ;;
doctor) exec python -m imatch.doctor "$@" ;;
shell) exec bash "$@" ;;
*)
    echo "no verb '$verb': lab (JupyterLab, the default; --cpu expects no GPU), batch FILE, doctor or shell" >&2
    exit 2
    ;;
esac
