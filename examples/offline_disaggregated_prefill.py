#!/usr/bin/env python
"""vLLM's offline example of disaggregated prefill, running: two LLMs, one prefills, one decodes.

P prefills two prompts. D answers three: it finds the KV of the first two at P –
by their content, there is no proxy – and prefills the third itself.

    python examples/offline_disaggregated_prefill.py [--model MODEL] [--connector NAME]

CUDA devices are used when there are any (P on the first, D on the second), else
the CPU. Without ``--model`` a small model is made on this machine.
"""

import argparse
import dataclasses
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

PROMPTS = [
    "Hello, my name is",
    "Hi, your name is",
    "Tell me a very long story",  # D prefills this one itself
]
AT_PREFILL = PROMPTS[:2]
TIMEOUT_S = 600


def kv_transfer_config(connector: str, role: str, rank: int) -> Any:
    """Build vLLM's configuration of a connector, for old and new releases."""
    from vllm.config import KVTransferConfig

    group = {"kv_rank": rank, "kv_parallel_size": 2}
    # P keeps what nobody has asked for yet for one lease; D may still be starting when P is done.
    extra = {"lease_s": float(TIMEOUT_S)}
    if {field.name for field in dataclasses.fields(KVTransferConfig)} >= set(group):
        return KVTransferConfig(kv_connector=connector, kv_role=role, kv_connector_extra_config=extra, **group)
    # vLLM 0.32 and later have no fields for them; kvconnect reads them from its own configuration.
    return KVTransferConfig(kv_connector=connector, kv_role=role, kv_connector_extra_config=extra | group)


def make_llm(args: argparse.Namespace, role: str, rank: int) -> Any:
    """Start an engine on its CUDA device, or on the CPU."""
    place: dict[str, Any]
    if args.devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.devices[rank % len(args.devices)]
        place = {"gpu_memory_utilization": 0.8 if len(args.devices) > 1 else 0.4}
    else:
        # Both engines share the cores; unbound threads keep them off each other's.
        cores = len(os.sched_getaffinity(0))
        os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS=str(max(1, cores // 2)))
        place = {"dtype": "float32", "block_size": 32, "kv_cache_memory_bytes": 256 << 20}
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if Path(args.model).is_dir() else "0")
    from vllm import LLM

    return LLM(
        model=args.model,
        kv_transfer_config=kv_transfer_config(args.connector, role, rank),
        max_model_len=2000,
        enforce_eager=True,
        disable_log_stats=False,  # for the count of fetched tokens below
        **place,
    )


def run_prefill(args: argparse.Namespace, prefill_done: Event, decode_done: Event) -> None:
    """P: make the KV, one token a prompt, and stay until D has fetched it."""
    from vllm import SamplingParams

    llm = make_llm(args, "kv_producer", 0)
    try:
        llm.generate(AT_PREFILL, SamplingParams(temperature=0, top_p=0.95, max_tokens=1))
        print("Prefill node is finished.", flush=True)
        prefill_done.set()
        decode_done.wait(TIMEOUT_S)
    finally:
        shut_down(llm)


def run_decode(args: argparse.Namespace, prefill_done: Event, decode_done: Event) -> None:
    """D: answer all prompts with the KV that is at P."""
    from vllm import SamplingParams

    llm = make_llm(args, "kv_consumer", 1)
    fetched = {}
    try:
        if not prefill_done.wait(TIMEOUT_S):
            sys.exit("the prefill node did not finish")
        for prompt in PROMPTS:
            before = tokens_from_p(llm)
            (output,) = llm.generate([prompt], SamplingParams(temperature=0, top_p=0.95), use_tqdm=False)
            fetched[prompt] = tokens_from_p(llm) - before
            print(f"Prompt: {prompt!r}, Generated: {output.outputs[0].text!r}")
            print(f"    {len(output.prompt_token_ids)} prompt tokens, {fetched[prompt]} from P", flush=True)
    finally:
        decode_done.set()
        shut_down(llm)
    if not all(fetched[prompt] > 0 for prompt in AT_PREFILL):
        sys.exit("the decode node computed a prompt whose KV was at the prefill node")


def shut_down(llm: Any) -> None:
    """End the engine's processes; this process would wait for them at its end, and nobody else ends them."""
    llm.llm_engine.engine_core.shutdown()


def tokens_from_p(llm: Any) -> int:
    """Return vLLM's own count of prompt tokens whose KV came from another engine."""
    return int(
        sum(
            metric.value
            for metric in llm.get_metrics()
            if metric.name.startswith("vllm:prompt_tokens_by_source")
            and metric.labels.get("source") == "external_kv_transfer"
        )
    )


def visible_cuda_devices() -> list[str]:
    """Return the devices as ``CUDA_VISIBLE_DEVICES`` names them; none on a machine without."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def main() -> int:
    """Run both nodes; 0 if D finished and used P's KV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model name or folder; default: a small one made on this machine")
    parser.add_argument("--connector", default="KvConnect", help="registered connector name (default: %(default)s)")
    args = parser.parse_args()
    args.devices = visible_cuda_devices()
    if args.model is None:
        from kvconnect.demo import model

        args.model = str(model.ensure())

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines are ended, below
    context = multiprocessing.get_context("spawn")
    events = context.Event(), context.Event()
    prefill = context.Process(target=run_prefill, args=(args, *events), name="prefill")
    decode = context.Process(target=run_decode, args=(args, *events), name="decode")
    try:
        prefill.start()
        decode.start()
        if wait([prefill.sentinel, decode.sentinel], TIMEOUT_S):
            # One has ended: the other follows soon, or one of them has failed.
            decode.join(60)
            prefill.join(30)
        if decode.exitcode is None:
            why = f"the prefill node ended with {prefill.exitcode}" if prefill.exitcode else "it took too long"
            print(f"the decode node did not finish: {why}", file=sys.stderr)
            return 1
        return decode.exitcode
    finally:
        for process in (decode, prefill):
            if process.is_alive():
                process.terminate()
                process.join(20)
            if process.is_alive():
                process.kill()


if __name__ == "__main__":
    sys.exit(main())
