"""As much of Kubernetes as a watcher of pods sees: its API server's list and watch, of pods as manifests make them."""

from __future__ import annotations

import asyncio
import json
from copy import deepcopy
from typing import Any
from urllib.parse import parse_qs

import yaml

from tests.deploy.pods import NAMESPACE


def pod(name: str, labels: dict[str, str], address: str) -> dict[str, Any]:
    """Return a pod that runs and is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "uid": name, "resourceVersion": "1", "labels": labels},
        "spec": {"containers": []},
        "status": {"phase": "Running", "podIP": address, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def is_going(pod: dict[str, Any]) -> dict[str, Any]:
    """Return the pod as it is while it ends."""
    going = deepcopy(pod)
    going["metadata"] |= {"resourceVersion": "2", "deletionTimestamp": "2026-01-01T00:00:00Z"}
    return going


class Cluster:
    """An ASGI application: the API server, of whose paths a watcher of one namespace's pods may ask one only."""

    def __init__(self, pods: list[dict[str, Any]]) -> None:
        self.pods = pods
        #: What was asked for, by verb.
        self.asked: set[tuple[str, str]] = set()
        self._watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Queue[dict[str, Any]]]] = []

    def change(self, pod: dict[str, Any]) -> None:
        """Tell all who watch; any thread."""
        for loop, changes in self._watchers:
            loop.call_soon_threadsafe(changes.put_nowait, {"type": "MODIFIED", "object": pod})

    def config(self, url: str) -> str:
        """Return a kubeconfig for this server."""
        entries = {"clusters": {"cluster": {"server": url}}, "users": {"user": {}}}
        entries["contexts"] = {"context": {"cluster": "x", "user": "x", "namespace": NAMESPACE}}
        named = {kind: [{"name": "x", **entry}] for kind, entry in entries.items()}
        return yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "x", **named})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        query = parse_qs(scope["query_string"].decode())
        watches = query.get("watch") == ["true"]
        self.asked.add(("watch" if watches else "list", scope["path"]))
        known = scope["path"] == f"/api/v1/namespaces/{NAMESPACE}/pods" and scope["method"] == "GET"
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200 if known else 403, "headers": headers})
        if watches and known:
            await self._watch(receive, send)
            return
        answer = {"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": self.pods}
        await send({"type": "http.response.body", "body": json.dumps(answer if known else {}).encode()})

    async def _watch(self, receive: Any, send: Any) -> None:
        changes: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._watchers.append((asyncio.get_running_loop(), changes))
        # The headers at once, as the real one does.
        await send({"type": "http.response.body", "body": b"", "more_body": True})

        async def tell() -> None:
            while True:
                line = json.dumps(await changes.get()).encode() + b"\n"
                await send({"type": "http.response.body", "body": line, "more_body": True})

        telling = asyncio.ensure_future(tell())
        while (await receive())["type"] != "http.disconnect":
            pass
        telling.cancel()
