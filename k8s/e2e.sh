#!/usr/bin/env bash
# Runs what docs/kubeflow.md describes on a real cluster and checks the result: check, upload, submit, wait, a run found by its key,
# rerun --from, rerun --only, the exit statuses 2 and 3. It takes about an hour on two cores.
#
# In this form it has not run on a cluster. Its commands ran there one by one (docs/tested-on.md), and tests/k8s/test_e2e.py runs the
# script against recordings of that cluster.
#
# You need: a cluster after steps 1 to 5 of docs/cluster.md (one node of two cores is enough), kubectl set to it, mixtune installed
# here. It reaches KFP and MLflow by `kubectl port-forward` on the ports 8888 and 5000, and takes MLflow's account from the secret
# mixtune-mlflow.
set -euo pipefail

NAMESPACE=${NAMESPACE:-kubeflow}
KFP_PORT=${KFP_PORT:-8888}
KFP=http://127.0.0.1:$KFP_PORT
# The names that MLflow answers to have this port (ALLOWED_HOSTS in k8s/base/tracking/settings.yaml).
MLFLOW=http://127.0.0.1:5000
# CPUs and memory of each task; KFP makes the limit the request, too. 200m fits beside KFP and Kubernetes on a kind node of two cores.
CPU=${CPU:-200m}
MEMORY=${MEMORY:-2Gi}

say() { printf '\n== %s\n' "$*"; }

fail() {
    printf 'e2e.sh: FAILED: %s\n' "$*" >&2
    exit 1
}

# expect STATUSES COMMAND...: runs a command that must end with one of the statuses, such as "0 3".
expect() {
    local statuses=$1 status=0
    shift
    "$@" || status=$?
    [[ " $statuses " == *" $status "* ]] || fail "exit status $status, expected $statuses: $*"
}

# field FILE NAME: prints a field of a JSON object.
field() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$1" "$2"; }

# equal WHAT FOUND EXPECTED
equal() { [ "$2" = "$3" ] || fail "$1 is '$2', expected '$3'"; }

# answers URL: waits up to half a minute until a server answers.
answers() {
    for _ in {1..30}; do
        if curl --silent --fail --max-time 5 "$1" > /dev/null; then return; fi
        sleep 1
    done
    fail "$1 does not answer"
}

# secret KEY: prints a value of the secret mixtune-mlflow.
secret() {
    local value
    value=$(kubectl --namespace "$NAMESPACE" get secret mixtune-mlflow --output="jsonpath={.data.$1}" | base64 --decode) \
        || fail "the secret mixtune-mlflow cannot be read; docs/cluster.md makes it in step 5"
    [ -n "$value" ] || fail "the secret mixtune-mlflow has no $1"
    printf '%s' "$value"
}

# nodes RUN: prints the names of Argo's nodes that the pods of a run belong to.
nodes() {
    local names
    names=$(kubectl --namespace "$NAMESPACE" get pods --selector "pipeline/runid=$1" \
        --output='jsonpath={range .items[*]}{.metadata.annotations.workflows\.argoproj\.io/node-name}{"\n"}{end}') \
        || fail "kubectl cannot list the pods of run $1"
    [ -n "$names" ] || fail "no pod has the label pipeline/runid=$1 (Argo deletes the pods of a run an hour after its end)"
    printf '%s\n' "$names"
}

# executed STEP: of the nodes on standard input, prints those in which a container of the step ran. A task from the cache has a driver's
# pod only. KFP numbers the second and later tasks of a step: evaluate, evaluate-2.
executed() { grep --extended-regexp "\.$1(-[0-9]+)?\([0-9]+\)\.executor\([0-9]+\)\$" || [ $? = 1 ]; }

# expect_executed RUN STEP...
expect_executed() {
    local run=$1 step found names
    names=$(nodes "$run")
    shift
    for step in "$@"; do
        found=$(executed "$step" <<< "$names")
        [ -n "$found" ] || fail "run $run: no pod executed $step"
    done
}

# expect_cached RUN STEP...
expect_cached() {
    local run=$1 step found names
    names=$(nodes "$run")
    shift
    for step in "$@"; do
        found=$(executed "$step" <<< "$names")
        [ -z "$found" ] || fail "run $run: $step should come from the cache, and this executed it: $found"
    done
}

# expect_verdict FILE: the verdict on record must not be that of a failed run.
expect_verdict() {
    local verdict
    verdict=$(field "$1" verdict)
    [[ $verdict != failed* ]] || fail "the run ended well, and its verdict in MLflow is '$verdict'"
}

forward() { # NAMESPACE SERVICE PORTS
    kubectl --namespace "$1" port-forward "service/$2" "$3" > "$WORK/$2.log" 2>&1 &
    FORWARDS+=($!)
}

stop_forwards() {
    local process
    for process in "${FORWARDS[@]}"; do kill "$process" 2> /dev/null || true; done
}

main() {
    local started key run again part only
    WORK=$(mktemp -d)
    FORWARDS=()
    trap stop_forwards EXIT
    started=$(date +%s)
    key=e2e-$started
    # A small run of the embedded default. With a seed of its own nothing of it is in the cache yet.
    local options=(
        --host "$KFP"
        --set "seed=$started"
        --set "pretrain.steps=60" --set "finetune.steps=40" --set "mixed.steps=40"
        --set "mixed.lambdas=[0.1,0.3]" --set "mixed.forgetting_budgets=[]"
        --set "placement.cpu=$CPU" --set "placement.gpu_cpu=$CPU"
        --set "placement.memory=$MEMORY" --set "placement.gpu_memory=$MEMORY"
        --set "placement.checkpoint_claim=mixtune-checkpoints"
    )
    local submit=(mixtune submit "${options[@]}" --service-account mixtune-runner)

    say "KFP's API at $KFP, MLflow at $MLFLOW"
    kubectl --namespace "$NAMESPACE" rollout status deployment/ml-pipeline --timeout=300s
    kubectl --namespace mixtune rollout status deployment/mixtune-mlflow --timeout=300s
    forward "$NAMESPACE" ml-pipeline "$KFP_PORT:8888"
    forward mixtune mixtune-mlflow 5000:5000
    answers "$KFP/apis/v2beta1/healthz"
    answers "$MLFLOW/health"
    MLFLOW_TRACKING_URI=$MLFLOW
    MLFLOW_TRACKING_USERNAME=$(secret MLFLOW_TRACKING_USERNAME)
    MLFLOW_TRACKING_PASSWORD=$(secret MLFLOW_TRACKING_PASSWORD)
    export MLFLOW_TRACKING_URI MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD

    say "The cluster has what a run needs"
    expect 0 mixtune check --cluster "${options[@]}"

    say "Upload twice: the second time the version exists"
    expect 0 mixtune upload "${options[@]}"
    expect 0 mixtune upload "${options[@]}" > "$WORK/upload"
    grep 'already uploaded' "$WORK/upload" || fail "the second upload made a version: $(cat "$WORK/upload")"

    say "Submit and wait: every step is executed"
    # A gate that is not met is as good here as one that is.
    expect "0 3" "${submit[@]}" --run-key "$key" --wait --timeout 2h --json --summary "$WORK/summary.md" > "$WORK/first.json"
    run=$(field "$WORK/first.json" run_id)
    expect_verdict "$WORK/first.json"
    expect_executed "$run" plan prepare pretrain finetune mixed evaluate compare finish
    [ -s "$WORK/summary.md" ] || fail "--summary wrote nothing"

    say "Submit with the same key: the same run"
    expect 0 "${submit[@]}" --run-key "$key" --json > "$WORK/again.json"
    again=$(field "$WORK/again.json" run_id)
    equal "the run with the same key" "$again" "$run"
    equal "found" "$(field "$WORK/again.json" found)" True

    say "Rerun from evaluate: the steps before it come from the cache"
    expect "0 3" mixtune rerun "$run" --from evaluate --host "$KFP" --run-key "$key-from" --wait --timeout 1h --json \
        > "$WORK/from.json"
    part=$(field "$WORK/from.json" run_id)
    expect_verdict "$WORK/from.json"
    expect_executed "$part" evaluate compare
    expect_cached "$part" prepare pretrain finetune mixed

    say "Rerun one task alone"
    expect 0 mixtune rerun "$run" --only "evaluate pretrained" --host "$KFP" --run-key "$key-only" --wait --timeout 1h --json \
        > "$WORK/only.json"
    only=$(field "$WORK/only.json" run_id)
    expect_executed "$only" evaluate
    expect_cached "$only" prepare pretrain finetune mixed compare

    say "A gate that no candidate meets: status 3"
    expect 3 "${submit[@]}" --set gate.min_task_score=0.99 --run-key "$key-gate" --wait --timeout 1h --json > "$WORK/gate.json"
    expect_verdict "$WORK/gate.json"

    say "Data that are not there: status 2"
    expect 2 "${submit[@]}" --set data.finetune.source=/nowhere.jsonl --run-key "$key-refused" --wait --timeout 30m --json \
        > "$WORK/refused.json"

    say "All checks passed. The commands' output is in $WORK"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main; fi
