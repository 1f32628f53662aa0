#!/bin/bash
# vLLM's online example of disaggregated prefill, running: a prefill server on 8100,
# a decode server on 8200, a proxy on 8000, and two requests, the second streaming.
#
#   examples/online_disaggregated_prefill.sh [MODEL]
#
# CUDA devices are used when there are any (P on 0, D on 1), else the CPU. Without
# MODEL a small model is made on this machine. Python is $PYTHON, else the active
# virtual environment's, else the checkout's .venv, else python3.

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    if [[ -n ${VIRTUAL_ENV:-} ]]; then PYTHON=$VIRTUAL_ENV/bin/python
    elif [[ -x $here/.venv/bin/python ]]; then PYTHON=$here/.venv/bin/python
    else PYTHON=python3; fi
fi

export VLLM_HOST_IP=${VLLM_HOST_IP:-127.0.0.1}
connector=${KV_CONNECTOR:-KvConnect}
start_timeout=${START_TIMEOUT_S:-420}
logs=$(mktemp -d "${TMPDIR:-/tmp}/kvconnect-online.XXXXXX")
servers=()
# vLLM never removes its socket files: keep them with the logs.
export VLLM_RPC_BASE_PATH=$logs

# Ends what this script started, each with its own children, and nothing else.
cleanup() {
    local status=$?
    trap - EXIT INT TERM
    for pid in "${servers[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
    for _ in {1..15}; do
        local alive=0
        for pid in "${servers[@]}"; do kill -0 -- "-$pid" 2>/dev/null && alive=1; done
        [[ $alive == 0 ]] && break
        sleep 1
    done
    for pid in "${servers[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
    if [[ $status == 0 ]]; then rm -rf "$logs"; else echo "failed ($status); logs: $logs" >&2; fi
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# start NAME COMMAND...: in the background, in a process group of its own
start() {
    local name=$1
    shift
    setsid "$@" >"$logs/$name.log" 2>&1 &
    servers+=($!)
    echo "started $name (process $!), log $logs/$name.log"
}

# wait_for_server NAME PORT PID
wait_for_server() {
    for ((second = 0; second < start_timeout; second++)); do
        if curl -sf -m 2 "http://127.0.0.1:$2/v1/models" >/dev/null; then
            echo "$1 is ready"
            return 0
        fi
        if ! kill -0 "$3" 2>/dev/null; then
            echo "$1 ended while starting:" >&2
            tail -n 40 "$logs/$1.log" >&2
            return 1
        fi
        if ((second % 10 == 9)); then echo "waiting for $1 ($((second + 1)) s)"; fi
        sleep 1
    done
    echo "$1 was not ready after $start_timeout s:" >&2
    tail -n 40 "$logs/$1.log" >&2
    return 1
}

for port in 8000 8100 8200; do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        echo "port $port is in use" >&2
        exit 1
    fi
done

MODEL=${1:-$("$PYTHON" -c 'from kvconnect.demo import model; print(model.ensure())')}
devices=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
common=(--model "$MODEL" --max-model-len 2000 --enforce-eager)
if [[ -d $MODEL ]]; then export HF_HUB_OFFLINE=1; fi
if ((devices > 0)); then
    d_device=$((devices > 1 ? 1 : 0))
    p_env=(CUDA_VISIBLE_DEVICES=0)
    d_env=(CUDA_VISIBLE_DEVICES=$d_device)
    common+=(--gpu-memory-utilization "$([[ $devices -gt 1 ]] && echo 0.8 || echo 0.4)")
else
    # The engines share the cores; unbound threads keep them off each other's.
    threads=$(($(nproc) / 2 > 0 ? $(nproc) / 2 : 1))
    p_env=(VLLM_CPU_OMP_THREADS_BIND=nobind "OMP_NUM_THREADS=$threads")
    d_env=("${p_env[@]}")
    common+=(--dtype float32 --block-size 32 --kv-cache-memory-bytes 268435456)
fi

# `vllm serve` where the distribution is called vllm; this works with the CPU build, too.
serve=("$PYTHON" -m vllm.entrypoints.openai.api_server)

# prefilling instance, the KV producer
start prefill env "${p_env[@]}" "${serve[@]}" --host 127.0.0.1 --port 8100 "${common[@]}" \
    --kv-transfer-config "{\"kv_connector\":\"$connector\",\"kv_role\":\"kv_producer\"}"
prefill=${servers[-1]}
# decoding instance, the KV consumer
start decode env "${d_env[@]}" "${serve[@]}" --host 127.0.0.1 --port 8200 "${common[@]}" \
    --kv-transfer-config "{\"kv_connector\":\"$connector\",\"kv_role\":\"kv_consumer\",\"kv_load_failure_policy\":\"recompute\"}"
decode=${servers[-1]}
wait_for_server prefill 8100 "$prefill"
wait_for_server decode 8200 "$decode"

# The proxy sends each request to the prefill server with one token to make, then to
# the decode server with the ticket that came back.
start proxy "$PYTHON" -m kvconnect proxy --port 8000 \
    --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
wait_for_server proxy 8000 "${servers[-1]}"

ask() {
    curl -sS --fail-with-body -m 120 -X POST "http://127.0.0.1:8000/v1/completions" \
        -H "Content-Type: application/json" -d "$1"
}
output1=$(ask "{\"model\": \"$MODEL\", \"prompt\": \"San Francisco is a\", \"max_tokens\": 10, \"temperature\": 0}")
output2=$(ask "{\"model\": \"$MODEL\", \"prompt\": \"Santa Clara is a\", \"max_tokens\": 10, \"temperature\": 0, \"stream\": true}")

echo
echo "Output of first request: $output1"
echo "Output of second request: $output2"
[[ $output1 == *'"text"'* && $output2 == *'data: [DONE]'* ]]

# vLLM's own count at the decode server of prompt tokens whose KV came from the other one
moved=$(curl -sf -m 10 http://127.0.0.1:8200/metrics |
    sed -n 's/^vllm:prompt_tokens_by_source_total{.*source="external_kv_transfer".*} //p')
echo "Tokens that the decode server took from the prefill server: ${moved:-0}"
[[ ${moved%%.*} -gt 0 ]]
echo "Successfully finished 2 test requests!"
