#!/usr/bin/env python
"""Ray Serve LLM's own prefill/decode app with KvConnect: any number of P and D replicas behind one endpoint.

    python examples/ray_serve_pd.py [--model MODEL] [--prefill N] [--decode N] [--port PORT] [--key-file FILE]

GPUs of the Ray cluster are used when it has any, one for each replica, else CPUs. Without ``--model`` a small
model is made on this machine. A running cluster is joined if RAY_ADDRESS names one; otherwise one is
started here. It serves until it is interrupted.

Replicas of one host need no address. For several hosts give ``--key-file``, a file with a secret that
lies on each of them (`openssl rand -hex 32`): every replica then listens on the address of its own node.
"""

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve.llm import build_pd_openai_app

NAME = "kvconnect-pd"


class OwnAddress(CallbackBase):  # type: ignore[misc]
    """Has a replica's engine listen on the address of the node that Ray has placed it on.

    The configuration is the same for all replicas; this runs in each of them, before its engine is made.
    """

    async def on_before_node_init(self) -> None:
        """Put the node's address into this replica's own copy of the configuration."""
        transfer = self.llm_config.engine_kwargs["kv_transfer_config"]
        extra = transfer["kv_connector_extra_config"] | {"bind_host": ray.util.get_node_ip_address()}
        self.llm_config.update_engine_kwargs(kv_transfer_config=transfer | {"kv_connector_extra_config": extra})


def config(args: argparse.Namespace, role: str, replicas: int, *, gpus: bool) -> dict[str, Any]:
    """Return what Ray calls an LLMConfig: one of the two deployments, with all of its replicas.

    No replica is told a port or an engine id: each binds free ports and says in its tickets where it is.
    """
    transfer: dict[str, Any] = {"kv_connector": args.connector, "kv_role": role}
    if role == "kv_consumer":
        transfer["kv_load_failure_policy"] = "recompute"
    found: dict[str, Any] = {
        "model_loading_config": {"model_id": args.model_id, "model_source": args.model},
        "deployment_config": {"num_replicas": replicas},
        "engine_kwargs": {"kv_transfer_config": transfer},
    }
    if args.key_file:
        transfer["kv_connector_extra_config"] = {"key_file": str(args.key_file.absolute())}
        found["callback_config"] = {"callback_class": OwnAddress}
    if not gpus:
        # Bundles without a GPU make it a deployment on CPUs. The engines share these, so Ray is not to count them.
        found["placement_group_config"] = {"bundles": [{"CPU": 0.01}]}
        found["deployment_config"] |= {"ray_actor_options": {"num_cpus": 0.01}, "health_check_timeout_s": 120}
        found["engine_kwargs"] |= {"dtype": "float32", "block_size": 32, "kv_cache_memory_bytes": 256 << 20}
        found["engine_kwargs"] |= {"enforce_eager": True}
        found["runtime_env"] = {"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}}
    return found


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model name or folder; default: a small one made on this machine")
    parser.add_argument("--model-id", help="what clients call it; default: the last part of MODEL")
    parser.add_argument("--connector", default="KvConnect", help="registered connector name (default: %(default)s)")
    parser.add_argument("--prefill", type=int, default=1, help="prefill replicas (default: %(default)s)")
    parser.add_argument("--decode", type=int, default=1, help="decode replicas (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="where HTTP is served (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="likewise (default: %(default)s)")
    parser.add_argument("--key-file", type=Path, help="for replicas on several hosts, see above")
    args = parser.parse_args()
    if args.model is None:
        from kvconnect.demo import model

        args.model = str(model.ensure())
    args.model_id = args.model_id or Path(args.model).name
    if Path(args.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")

    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        ray.init()
        stack.callback(ray.shutdown)  # ends the cluster, too, if it was started above
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        gpus = ray.cluster_resources().get("GPU", 0) > 0
        app = build_pd_openai_app(
            {
                "prefill_config": config(args, "kv_producer", args.prefill, gpus=gpus),
                "decode_config": config(args, "kv_consumer", args.decode, gpus=gpus),
            }
        )
        serve.start(http_options={"host": args.host, "port": args.port})
        stack.callback(serve.delete, NAME)
        serve.run(app, name=NAME)
        print(f"{args.model_id!r} is served at http://{args.host}:{args.port}/v1", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
