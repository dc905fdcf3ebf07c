#!/bin/sh
# Installs into a folder and leaves there only what runs. The images come out at half of what pip installs.
# install.sh FOLDER PIP-ARGUMENTS...
set -eu
folder="$1"
shift
if [ -s /run/secrets/ca ]; then
    export PIP_CERT=/run/secrets/ca
fi
if [ -d /docker/wheels ]; then
    set -- --find-links /docker/wheels "$@"
fi
# No bytecode: it goes to the mounted home, where the steps of a run share it (PYTHONPYCACHEPREFIX).
/opt/venv/bin/python3 -m pip install --quiet --no-compile --target "$folder" "$@"

# Tests, headers, sources and stubs of compiled modules, manual pages, programs of torch's own build. (lm_eval has tasks of
# such names.)
find "$folder" -depth -type d \( -name tests -o -name test -o -name include \) ! -path '*/lm_eval/*' -exec rm -rf {} +
find "$folder" -type f \( -name '*.a' -o -name '*.h' -o -name '*.hpp' -o -name '*.c' -o -name '*.cpp' -o -name '*.f90' \
    -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pyi' -o -name '*.exe' \) -delete
rm -rf "$folder/share"
if [ -d "$folder/torch/bin" ]; then
    find "$folder/torch/bin" -type f ! -name torch_shm_manager -delete
fi
# What no step uses: MLflow's user interface, samples, services of AWS other than storage and sign-in, Arrow's network protocol,
# the files that transformers' models were generated from.
rm -rf "$folder/mlflow/server/js" "$folder"/pyarrow/*flight*
rm -rf "$folder/matplotlib/mpl-data/sample_data"
# A wheel cannot hold links, so that libraries with several names are in it several times.
for library in "$folder"/pyarrow/lib*.so.*.*.*; do
    if [ -f "$library" ]; then
        ln -sf "${library##*/}" "${library%.*.*}"
        ln -sf "${library##*/}" "${library%.so.*}.so"
    fi
done
if [ -d "$folder/botocore/data" ]; then
    find "$folder/botocore/data" -mindepth 1 -maxdepth 1 -type d \
        ! -name s3 ! -name sts ! -name 'sso*' ! -name signin -exec rm -rf {} +
fi
if [ -d "$folder/transformers" ]; then
    find "$folder/transformers" -name 'modular_*.py' -delete
fi
/opt/venv/bin/python3 /docker/strip_libraries.py "$folder"
# What pip notes of the place that it installed from: an address or a path of the machine that built the image.
find "$folder" -name direct_url.json -delete
# Any uid may read it; nobody but root may write.
chmod -R u=rwX,go=rX "$folder"
