"""The chart and what it renders: valid for two Kubernetes versions, of one piece, and accepted by what will read it."""

import json
import socket
from pathlib import Path

import helm_python
import psutil
import pytest
import yaml

from bench.report import ROOT
from kvconnect import listing
from kvconnect.config import Config
from kvconnect.doctor import intent
from kvconnect.errors import ConfigError
from kvconnect.keys import Keys
from kvconnect.proxy import main
from kvconnect.proxy.app import build
from kvconnect.proxy.settings import Settings
from tests.buffers.engines import engines
from tests.buffers.test_access import hand_over
from tests.deploy import pods
from tools.manifests.__main__ import CHART, PLAIN, plain, render

DEFAULT = pods.load(plain())
#: What users may set, each held to the same checks.
VARIANTS = {
    "default": {},
    "own image": {"code": {"init": False}, "image": "registry.example/kvconnect-vllm:0.1.0"},
    "one pipe": {"connector": "KvConnectNixl", "options": {"pipe": {"name": "nixl", "backends": ["UCX"]}}},
    "other ports": {"ports": {"http": 9000, "control": 15000}},
    "several GPUs": {"prefill": {"replicas": 3, "args": ["--tensor-parallel-size=4"]}},
    "no policy": {"networkPolicy": {"enabled": False}},
    "scraped": {"networkPolicy": {"httpFrom": [{"namespaceSelector": {"matchLabels": {"team": "metrics"}}}]}},
    "one host": {"pod": {"hostIPC": True, "nodeSelector": {"gpu": "h200"}}, "env": [{"name": "X", "value": "1"}]},
    "vllm-router": {"proxy": {"kind": "vllm-router", "replicas": 2}},
    "claimed home": {"home": {"persistentVolumeClaim": {"claimName": "weights"}}},
}


def rendered(values):
    return pods.load(render(values, "pd"))


def engine(documents, component):
    template = pods.pods(documents)[f"pd-{component}"]
    (container,) = template["spec"]["containers"]
    return template, container


# -- validity ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_rendered_is_valid_for_both_versions(variant):
    pods.check(rendered(VARIANTS[variant]))


def test_helm_finds_nothing_to_say_about_the_chart():
    report = helm_python.lint(CHART, strict=True)
    assert [found for found in report["messages"] if found["severity"] > 1] == report["errors"] == []


def test_a_field_that_kubernetes_does_not_know_would_be_noticed():
    documents = rendered({"pod": {"hostIPX": True}})
    with pytest.raises(Exception, match="hostIPX"):
        pods.check(documents)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"modle": "x"}, "modle"),
        ({"ports": {"control": 0}}, "/ports/control"),
        ({"prefill": {"replica": 2}}, "replica"),
        ({"connector": "NixlConnector"}, "/connector"),
        ({"proxy": {"kind": "smg"}}, "/proxy/kind"),
        ({"clusterDomain": "cluster.local."}, "/clusterDomain"),
    ],
)
def test_a_value_that_the_chart_does_not_know_is_refused_by_name(values, told):
    with pytest.raises(helm_python.HelmError, match=told):
        render(values, "pd")


def test_the_plain_manifests_are_what_the_chart_renders():
    assert PLAIN.read_text("utf-8") == plain(), "run python -m tools.manifests"


def test_nothing_is_bound_to_a_namespace():
    assert not any("namespace" in document["metadata"] for document in DEFAULT)


# -- of one piece --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_ports_names_and_labels_agree(variant):
    documents = rendered(VARIANTS[variant])
    templates = pods.pods(documents)
    for name, service in pods.of_kind(documents, "Service").items():
        meant = [key for key, pod in templates.items() if pods.matches(service["spec"]["selector"], labels(pod))]
        assert meant == [name]
        (container,) = templates[name]["spec"]["containers"]
        assert {row["targetPort"] for row in service["spec"]["ports"]} <= pods.ports(container).keys()
    for template in templates.values():
        (container,) = template["spec"]["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            for how in ("httpGet", "tcpSocket"):
                named = container.get(probe, {}).get(how, {}).get("port", "http")
                assert named in pods.ports(container)
    for component in ("prefill", "decode"):
        _, container = engine(documents, component)
        assert pods.option(pods.arguments(container), "--port") == str(pods.ports(container)["http"])
        extra = pods.transfer(container)["kv_connector_extra_config"]
        assert pods.ports(container).get("control", 0) == extra.get("port", 0)


def labels(template):
    return template["metadata"]["labels"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_policy_is_for_the_engines_and_lets_in_whom_they_need(variant):
    documents = rendered(VARIANTS[variant])
    policies = pods.of_kind(documents, "NetworkPolicy")
    if variant == "no policy":
        assert not policies
        return
    (policy,) = policies.values()
    templates = pods.pods(documents)
    selector = policy["spec"]["podSelector"]
    assert {name for name, pod in templates.items() if pods.matches(selector, labels(pod))} == {
        "pd-prefill",
        "pd-decode",
    }
    _, container = engine(documents, "prefill")
    http, control = (pods.ports(container)[name] for name in ("http", "control"))
    assert list(pods.allowed(policy, labels(templates["pd-proxy"]))) == [range(http, http + 1)]
    from_engines = list(pods.allowed(policy, labels(templates["pd-decode"])))
    assert range(control, control + 1) in from_engines
    assert not any(http in ports for ports in from_engines)
    assert list(pods.allowed(policy, {"app": "somebody else's"})) == []


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("component", ["prefill", "decode"])
def test_volumes_and_code_are_where_they_are_looked_for(variant, component):
    template, container = engine(rendered(VARIANTS[variant]), component)
    pods.check_volumes(template)
    if VARIANTS[variant].get("code", {}).get("init", True):
        pods.check_code(template, yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))["code"]["image"])
    else:
        assert "initContainers" not in template["spec"]
        assert "PYTHONPATH" not in pods.environment(container, "10.1.2.3")


def test_pods_run_as_nobody_in_particular_and_write_to_volumes_only():
    for template in pods.pods(DEFAULT).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        for container in (*spec["containers"], *spec.get("initContainers", [])):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


# -- what reads it -------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path):
    """A key as the kubelet mounts it for an `fsGroup`."""
    path = tmp_path / "key"
    path.write_text("0123456789abcdef" * 4)
    path.chmod(0o440)
    return str(path)


def on_this_host(transfer, key_file):
    """Return the same configuration with the key where it is here."""
    assert transfer["kv_connector_extra_config"]["key_file"] == pods.KEY_PATH
    return transfer | {"kv_connector_extra_config": transfer["kv_connector_extra_config"] | {"key_file": key_file}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("component", ["prefill", "decode"])
def test_an_engine_would_start_with_its_configuration(variant, component, key_file):
    _, container = engine(rendered(VARIANTS[variant]), component)
    transfer = on_this_host(pods.transfer(container, "127.0.0.2"), key_file)
    wanted, findings = intent.examine(transfer)
    assert wanted is not None
    assert {found.verdict for found in findings} == {"ok"}, findings
    assert wanted.config.bind_host == "127.0.0.2"
    assert transfer["kv_role"] == {"prefill": "kv_producer", "decode": "kv_consumer"}[component]


def test_vllm_takes_the_configurations():
    config = pytest.importorskip("vllm.config")
    for component in ("prefill", "decode"):
        given = pods.transfer(engine(DEFAULT, component)[1])
        assert config.KVTransferConfig(**given).kv_connector == "KvConnect"


def test_a_misspelt_option_would_stop_the_engine_by_name(key_file):
    _, container = engine(rendered({"options": {"leese_s": 60}}), "decode")
    wanted, (found,) = intent.examine(on_this_host(pods.transfer(container), key_file))
    assert wanted is None
    assert "did you mean 'lease_s'?" in found.what


def test_two_pods_hand_over_through_the_ports_that_the_policy_allows(key_file):
    """By their own configurations, each at an address of its own."""
    with socket.create_server(("127.0.0.2", 0)) as free:
        port = free.getsockname()[1]
    documents = rendered({"ports": {"control": port}})
    (policy,) = pods.of_kind(documents, "NetworkPolicy").values()
    template, _ = engine(documents, "decode")
    sides = []
    for component, address in (("prefill", "127.0.0.2"), ("decode", "127.0.0.3")):
        transfer = on_this_host(pods.transfer(engine(documents, component)[1], address), key_file)
        sides.append(transfer["kv_connector_extra_config"])
        Config.parse(sides[-1])
    with engines(*sides, pipe="tcp") as (p, d):
        hand_over(p, d, "ticket")
        connections = psutil.Process().net_connections("tcp")
        listening = {at.laddr.port for at in connections if at.status == "LISTEN" and at.laddr.ip == "127.0.0.2"}
    assert port in listening
    assert len(listening) > 2, "the worker's and the pipe's, too"
    ranges = list(pods.allowed(policy, labels(template)))
    assert all(any(number in ports for ports in ranges) for number in listening)


def test_the_policys_free_ports_are_those_of_a_new_network_namespace():
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))["ports"]
    kernel = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text("ascii").split()
    if kernel != ["32768", "60999"]:
        pytest.skip("this host's administrator has chosen another range, which new namespaces do not inherit")
    assert [values["firstFree"], values["lastFree"]] == [int(number) for number in kernel]


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"vllm-router"}))  # which has a file of its own
def test_the_proxy_takes_its_arguments_and_finds_the_engines(variant):
    documents = rendered(VARIANTS[variant])
    (container,) = pods.pods(documents)["pd-proxy"]["spec"]["containers"]
    words = pods.arguments(container)
    assert words[:4] == ["python3", "-m", "kvconnect", "proxy"]
    options = main.parser().parse_args(words[4:])
    assert options.port == pods.ports(container)["http"]
    spec = pods.pods(documents)["pd-proxy"]["spec"]
    (_, pause) = container["lifecycle"]["preStop"]["exec"]["command"]
    assert options.stop_timeout_s + int(pause) < spec["terminationGracePeriodSeconds"]
    services = pods.of_kind(documents, "Service")
    for leg in ("prefill", "decode"):
        spec = services[f"pd-{leg}"]["spec"]
        (row,) = spec["ports"]
        assert getattr(options, leg) == [f"dns+http://pd-{leg}.{pods.NAMESPACE}.svc.cluster.local.:{row['port']}"]
        # Of such a Service the name's addresses are the pods', and its ports are not translated.
        assert spec["clusterIP"] == "None"
        assert row["port"] == pods.ports(engine(documents, leg)[1])[row["targetPort"]]
    Settings(prefill=tuple(options.prefill), decode=tuple(options.decode))
    paths = {route.path for route in build(Settings()).routes}
    assert container["readinessProbe"]["httpGet"]["path"] in paths


def test_the_default_connector_is_one_that_is_registered():
    names = {row.name for row in listing.rows() if row.kind == "connector"}
    assert pods.transfer(engine(DEFAULT, "decode")[1])["kv_connector"] in names


# -- the key -------------------------------------------------------------------------------


def test_the_example_of_a_secret_is_valid_named_as_the_engines_expect_and_refused_as_it_stands(tmp_path):
    (secret,) = documents = pods.load((ROOT / "deploy" / "kubernetes" / "secret-example.yaml").read_text("utf-8"))
    pods.check(documents)
    template, _ = engine(DEFAULT, "prefill")
    (volume,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == "key"]
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]
    assert {item["key"] for item in volume["secret"]["items"]} == secret["stringData"].keys()
    path = tmp_path / "key"
    path.write_text(secret["stringData"]["key"])
    path.chmod(0o440)
    with pytest.raises(ConfigError, match="can be guessed"):
        Keys.from_shared(str(path), "key_file")


def test_no_manifest_holds_a_secret():
    assert not pods.of_kind(DEFAULT, "Secret")
    assert "stringData" not in json.dumps(DEFAULT)
