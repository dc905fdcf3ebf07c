#!/bin/sh
# install_torch.sh FOLDER cpu|cuda
set -eu
pins=/docker/requirements-torch.txt
case "$2" in
    cpu)
        # Without `+cpu` pip would rather take a CUDA build of several gigabytes.
        sed 's/^\(torch==[0-9.]*\)$/\1+cpu/' "$pins" > /tmp/pins.txt
        ;;
    cuda)
        # The libraries of CUDA are what torch itself asks for, at the versions that it names.
        cp "$pins" /tmp/pins.txt
        if [ -d /docker/wheels ]; then
            echo "docker/wheels must be empty for TORCH_VARIANT=cuda: a CPU build in it would be taken" >&2
            exit 2
        fi
        ;;
    *)
        echo "TORCH_VARIANT must be cpu or cuda, found $2" >&2
        exit 2
        ;;
esac
sh /docker/install.sh "$1" --no-deps --requirement /tmp/pins.txt
if [ "$2" = cuda ]; then
    /opt/venv/bin/python3 /docker/cuda_packages.py "$1" > /tmp/cuda.txt
    sh /docker/install.sh "$1" --no-deps --requirement /tmp/cuda.txt
fi
