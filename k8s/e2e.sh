#!/usr/bin/env bash
# All of docs/kubeflow.md on a real cluster: check, upload, submit, wait, a key found again, rerun --from, rerun --only.
#
# It has NOT been run: where mixtune is made there is no cluster, and no image can be pulled. It is kept short so that it can be
# read before it is trusted. tests/pipelines/ run the same commands against a small server that speaks KFP's REST API.
#
# You need: a cluster (kind or minikube) with KFP 2.17 in the namespace kubeflow, installed by its own manifests; an MLflow server
# that both the cluster and this machine reach at MLFLOW_TRACKING_URI, serving artifacts; the images of `make images`, loaded into
# the cluster (`kind load docker-image`, `minikube image load`); mixtune installed here; kubectl set to the cluster.
set -euo pipefail

: "${MLFLOW_TRACKING_URI:?set it to an address that both the cluster and this machine reach}"
NAMESPACE=${NAMESPACE:-kubeflow}
PORT=${PORT:-8888}
HOST=http://127.0.0.1:$PORT
WORK=$(mktemp -d)
STARTED=$(date +%s)

say() { printf '\n== %s\n' "$*"; }
expect() { # STATUS COMMAND...: runs a command that must end with this status
    local wanted=$1 status=0
    shift
    "$@" || status=$?
    [ "$status" = "$wanted" ] || { echo "ended with $status, not $wanted: $*" >&2; exit 1; }
}
field() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$1" "$2"; }

say "KFP's API at $HOST"
kubectl --namespace "$NAMESPACE" rollout status deployment/ml-pipeline --timeout=300s
kubectl --namespace "$NAMESPACE" port-forward service/ml-pipeline "$PORT:8888" > "$WORK/port-forward.log" 2>&1 &
FORWARD=$!
trap 'kill $FORWARD 2>/dev/null || true' EXIT
for _ in $(seq 30); do
    curl --silent --fail "$HOST/apis/v2beta1/healthz" > /dev/null && break
    sleep 1
done

say "The secret that steps take MLflow's address from"
kubectl --namespace "$NAMESPACE" create secret generic mixtune-mlflow \
    --from-literal=MLFLOW_TRACKING_URI="$MLFLOW_TRACKING_URI" --dry-run=client --output=yaml | kubectl apply --filename=-

say "What the cluster lacks: nothing"
SMALL=(--set placement.cpu=1 --set placement.memory=2Gi --set placement.gpu_cpu=2 --set placement.gpu_memory=4Gi)
expect 0 mixtune check --cluster --host "$HOST" "${SMALL[@]}"

say "Upload twice: the second time it is there already"
mixtune upload --host "$HOST" "${SMALL[@]}"
mixtune upload --host "$HOST" "${SMALL[@]}" | grep 'is there already'

say "Submit the embedded default and wait; then a job with the same key finds that run"
KEY=e2e-$STARTED
# 0: the gate was met; 3: it was not. Both are good here.
status=0
mixtune submit --host "$HOST" "${SMALL[@]}" --run-key "$KEY" --wait --timeout 2h --json --summary "$WORK/summary.md" \
    > "$WORK/first.json" || status=$?
[ "$status" = 0 ] || [ "$status" = 3 ] || { cat "$WORK/first.json"; exit 1; }
RUN=$(field "$WORK/first.json" run_id)
mixtune submit --host "$HOST" "${SMALL[@]}" --run-key "$KEY" --json > "$WORK/again.json"
[ "$(field "$WORK/again.json" run_id)" = "$RUN" ]
[ "$(field "$WORK/again.json" found)" = True ]

say "Rerun from evaluate: what comes before is from the cache"
mixtune rerun "$RUN" --from evaluate --host "$HOST" --run-key "$KEY-from" --wait --timeout 1h --json > "$WORK/from.json" \
    || [ $? = 3 ]
FROM=$(field "$WORK/from.json" run_id)
# A cached task has no pod that ran its container.
kubectl --namespace "$NAMESPACE" get pods --selector "pipeline/runid=$FROM" --output=name | tee "$WORK/pods"
! grep --quiet -e pretrain-executor -e finetune-executor -e mixed-executor "$WORK/pods"

say "Rerun one step alone"
mixtune rerun "$RUN" --only "evaluate pretrained" --host "$HOST" --run-key "$KEY-only"

say "A gate that nobody meets is status 3"
expect 3 mixtune submit --host "$HOST" "${SMALL[@]}" --set gate.max_score_drop=0 --set gate.max_forgetting=0 \
    --run-key "$KEY-gate" --wait --timeout 1h --json

say "Bad data is status 2"
expect 2 mixtune submit --host "$HOST" "${SMALL[@]}" --set data.finetune.source=/nowhere.jsonl \
    --run-key "$KEY-refused" --wait --timeout 30m --json

say "done; what was written is in $WORK"
