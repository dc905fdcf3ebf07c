#!/bin/sh
# pip.sh ARGUMENTS...          pip, with the certificates and wheels that were handed over for the build alone
set -eu
if [ -s /run/secrets/ca ]; then
    export PIP_CERT=/run/secrets/ca
fi
if [ -d /docker/wheels ]; then
    export PIP_FIND_LINKS=/docker/wheels
fi
export PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_USE_PEP517=1
exec python3 -m pip --quiet "$@"
