"""The chart with vllm-router in place of the proxy: the real one, with its arguments, before fake engines."""

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.deploy import pods
from tests.deploy.cluster import Cluster, is_going, pod
from tests.proxy.servers import TICKET, WAIT_S, FakeEngine, Served, answers, gives_ticket, until
from tools.manifests.__main__ import render

VALUES = {"proxy": {"kind": "vllm-router", "args": ["--policy=round_robin"]}}
ALL = "0.0.0.0"  # noqa: S104 - in a pod
PROGRAM = Path(sys.executable).with_name("vllm-router")


def rendered(**ports):
    return pods.load(render(VALUES | {"ports": ports}, "pd"))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def completions(engine):
    """Return the requests of clients: it asks engines for other things, too."""
    return [seen for seen in engine.seen if seen.path == "/v1/completions"]


def router(documents):
    template = pods.pods(documents)["pd-proxy"]
    (container,) = template["spec"]["containers"]
    return template, container


def test_its_own_parser_takes_the_arguments_and_its_selectors_mean_the_engines():
    launch = pytest.importorskip("vllm_router.launch_router")
    documents = rendered(http=9000)
    templates = pods.pods(documents)
    _, container = router(documents)
    command, *words = pods.arguments(container)
    assert command == "vllm-router"
    given = launch.parse_router_args(words)
    given._validate_router_args()
    assert given.port == given.service_discovery_port == 9000
    assert given.host == given.prometheus_host == ALL
    assert given.prometheus_port == pods.ports(container)["metrics"]
    assert given.policy == "round_robin"
    assert given.service_discovery_namespace == pods.NAMESPACE
    for component in ("prefill", "decode"):
        selector = getattr(given, f"{component}_selector")
        meant = [name for name, it in templates.items() if pods.matches(selector, it["metadata"]["labels"])]
        assert meant == [f"pd-{component}"]


def test_it_may_watch_the_pods_of_its_namespace_and_nothing_else():
    documents = rendered()
    template, _ = router(documents)
    account = template["spec"]["serviceAccountName"]
    assert template["spec"]["automountServiceAccountToken"] is True
    (role,), (binding,), (of,) = (
        pods.of_kind(documents, kind).values() for kind in ("Role", "RoleBinding", "ServiceAccount")
    )
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == ("Role", role["metadata"]["name"])
    (subject,) = binding["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": account, "namespace": pods.NAMESPACE}
    assert of["metadata"]["name"] == account
    assert of["automountServiceAccountToken"] is False, "it is mounted where it is asked for"


def test_without_it_there_is_no_access_to_the_api():
    documents = pods.load(render({}, "pd"))
    assert not [found for found in documents if found["kind"] in {"Role", "RoleBinding", "ServiceAccount"}]


@contextlib.contextmanager
def engines(documents, http):
    """Two pods of each kind and the proxy's, as the API server tells of them; a fake engine behind each address."""
    templates = pods.pods(documents)
    served, told = {}, []
    with contextlib.ExitStack() as stack:
        for number, (component, behave) in enumerate([("prefill", gives_ticket), ("decode", answers)] * 2, 2):
            address = f"127.0.0.{number}"
            served[address] = FakeEngine(behave)
            stack.enter_context(Served(served[address], listener=socket.create_server((address, http))))
            told.append(pod(f"pd-{component}-{number}", templates[f"pd-{component}"]["metadata"]["labels"], address))
        told.append(pod("pd-proxy", templates["pd-proxy"]["metadata"]["labels"], "127.0.0.9"))
        yield served, told


@contextlib.contextmanager
def running(documents, cluster, folder):
    """Run the router with its arguments, but for its address: the engines have the others of the port."""
    _, container = router(documents)
    words = [word.replace(f"--host={ALL}", "--host=127.0.0.1") for word in pods.arguments(container)]
    with Served(cluster) as api, (folder / "log").open("w") as log:
        (folder / "config").write_text(cluster.config(api.url))
        variables = {"KUBECONFIG": str(folder / "config")}
        process = subprocess.Popen([PROGRAM, *words[1:]], env=variables, stdout=log, stderr=log, cwd=folder)
        try:
            url = f"http://127.0.0.1:{pods.ports(container)['http']}"
            with httpx.Client(base_url=url, trust_env=False, timeout=WAIT_S) as client:
                yield client
        finally:
            process.terminate()
            process.wait(WAIT_S)


def ready(client, documents, of_each):
    """Whether it finds itself ready, with so many engines of each kind."""
    path = router(documents)[1]["readinessProbe"]["httpGet"]["path"]
    with contextlib.suppress(httpx.TransportError):
        answer = client.get(path)
        found = answer.json() if answer.status_code == 200 else {}
        return [found.get(leg, {}).get("healthy") for leg in ("prefill", "decode")] == [of_each] * 2


@pytest.mark.skipif(not PROGRAM.exists(), reason="runs vllm-router")
@pytest.mark.timeout(120)
def test_it_finds_each_pod_hands_over_between_them_and_leaves_out_who_goes(tmp_path):
    http = free_port()
    documents = rendered(http=http, routerMetrics=free_port())

    def ask(times):
        for number in range(times):
            answer = client.post("/v1/completions", json={"model": "m", "prompt": f"{number}", "max_tokens": 4})
            assert (answer.status_code, answer.json()["id"]) == (200, "d")
        return [len(completions(engine)) for engine in served.values()]

    with engines(documents, http) as (served, told):
        cluster = Cluster(told)
        with running(documents, cluster, tmp_path) as client:
            until(lambda: ready(client, documents, 2))
            assert ask(4) == [2, 2, 2, 2]
            given = [seen.body["kv_transfer_params"]["kvconnect"] for seen in completions(served["127.0.0.3"])]
            assert given == [TICKET["kvconnect"]] * 2
            for going in told[:2]:
                cluster.change(is_going(going))
            until(lambda: ready(client, documents, 1))
            assert ask(2) == [2, 2, 4, 4]
            port = pods.ports(router(documents)[1])["metrics"]
            assert httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).status_code == 200
    allowed = f"/api/v1/namespaces/{pods.NAMESPACE}/pods"
    assert cluster.asked == {("list", allowed), ("watch", allowed)}
