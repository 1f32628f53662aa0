"""Values and manifests for what others deploy: production-stack's chart, KServe's services."""

import json
import os
import subprocess
from pathlib import Path

import helm_python
import jsonschema
import pytest
import yaml

from bench.report import ROOT
from kvconnect.doctor import intent
from tests.deploy import pods

DEPLOY = ROOT / "deploy"
STACK = yaml.safe_load((DEPLOY / "production-stack" / "values.yaml").read_text("utf-8"))
POLICY = pods.load((DEPLOY / "production-stack" / "networkpolicy.yaml").read_text("utf-8"))
(SERVICE,) = pods.load((DEPLOY / "kserve" / "llminferenceservice.yaml").read_text("utf-8"))
IMAGE = yaml.safe_load((DEPLOY / "helm" / "kvconnect-pd" / "values.yaml").read_text("utf-8"))["code"]["image"]
ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


def of_stack(model):
    """Return the pod that the chart's documented fields come to."""
    container = {
        "name": "vllm",
        "command": ["vllm", "serve", model["modelURL"], *model["vllmConfig"]["extraArgs"]],
        # The chart's own, before those of the values.
        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}, *model["env"]],
        "volumeMounts": model["extraVolumeMounts"],
    }
    init = dict(model["initContainer"])
    init["volumeMounts"] = init.pop("extraVolumeMounts")
    context = STACK["servingEngineSpec"]["securityContext"]
    spec = {"containers": [container], "initContainers": [init], "volumes": model["extraVolumes"]}
    return {"metadata": {"labels": {"app": model["name"]}}, "spec": {**spec, "securityContext": context}}


def of_kserve(component):
    """Return the pod of one half of the service: what is merged into KServe's preset."""
    half = SERVICE["spec"]["prefill"] if component == "prefill" else SERVICE["spec"]
    return {"metadata": {"labels": {"app": component}}, "spec": half["template"]}


PODS = {f"production-stack {model['name']}": of_stack(model) for model in STACK["servingEngineSpec"]["modelSpec"]} | {
    f"kserve {component}": of_kserve(component) for component in ROLES
}


def deployment(template):
    selector = {"matchLabels": template["metadata"]["labels"]}
    spec = {"selector": selector, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": spec}


@pytest.mark.parametrize("pod", PODS)
def test_the_pods_are_valid_and_of_one_piece(pod):
    pods.check([deployment(PODS[pod])])
    pods.check_volumes(PODS[pod])
    pods.check_code(PODS[pod], IMAGE)


@pytest.mark.parametrize("pod", PODS)
def test_an_engine_would_start_with_its_configuration(pod, tmp_path):
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 4)
    key.chmod(0o440)
    (container,) = PODS[pod]["spec"]["containers"]
    transfer = pods.transfer(container, "127.0.0.2")
    extra = transfer["kv_connector_extra_config"]
    assert extra.pop("key_file") == pods.KEY_PATH
    extra["key_file"] = str(key)
    wanted, findings = intent.examine(transfer)
    assert wanted is not None
    assert {found.verdict for found in findings} == {"ok"}, findings
    assert transfer["kv_role"] == ROLES[pod.split()[1]]
    assert wanted.config.port == (14600 if pod.endswith("prefill") else 0)


def test_the_values_are_of_types_that_the_chart_documents():
    schema = yaml.safe_load(Path(__file__).with_name("production_stack.yaml").read_text("utf-8"))
    jsonschema.validate(STACK, schema)
    for wrong in ({"routerSpec": {"routingLogic": "kvconnect"}}, {"servingEngineSpec": {"modelSpec": [{"nam": "x"}]}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_the_router_means_the_models_by_their_names_and_so_does_the_policy():
    arguments = STACK["routerSpec"]["extraArgs"]
    names = [pods.option(arguments, f"--{leg}-model-labels") for leg in ROLES]
    assert names == [model["name"] for model in STACK["servingEngineSpec"]["modelSpec"]] == list(ROLES)
    (policy,) = POLICY
    pods.check(POLICY)
    for name in names:
        assert pods.matches(policy["spec"]["podSelector"], {"model": name, "helm-release-name": "pd"})
        ranges = list(pods.allowed(policy, {"model": name, "helm-release-name": "pd"}))
        assert ranges == [range(14600, 14601), range(32768, 61000)]
    http = STACK["servingEngineSpec"]["containerPort"]
    assert list(pods.allowed(policy, {"environment": "router"})) == [range(http, http + 1)]


@pytest.mark.parametrize("component", ROLES)
def test_kserves_shell_leaves_the_configuration_whole(component):
    """Its preset appends the variable inside an `eval`."""
    (container,) = of_kserve(component)["spec"]["containers"]
    variables = pods.environment(container, "10.1.2.3")
    script = r'eval "exec printf %s\\\\n vllm serve /mnt/models ${VLLM_ADDITIONAL_ARGS} $@"'
    done = subprocess.run(
        ["/bin/bash", "-c", script], env=os.environ | variables, capture_output=True, text=True, timeout=20, check=True
    )
    words = done.stdout.splitlines()
    assert json.loads(pods.option(words, "--kv-transfer-config")) == pods.transfer(container)


@pytest.mark.skipif("KVCONNECT_PRODUCTION_STACK" not in os.environ, reason="wants a copy of production-stack's helm/")
def test_their_own_chart_renders_the_values_into_valid_pods_with_our_configuration():
    chart = Path(os.environ["KVCONNECT_PRODUCTION_STACK"])
    jsonschema.validate(STACK, json.loads((chart / "values.schema.json").read_text("utf-8")))
    with helm_python.Chart.load(chart) as loaded:
        rendered = loaded.render(STACK, name="pd", namespace="default")
    documents = [document for text in rendered.values() for document in pods.load(text)]
    pods.check(documents)
    templates = pods.pods(documents)
    (policy,) = POLICY
    for name, role in ROLES.items():
        template = templates[f"pd-{name}-deployment-vllm"]
        (container,) = template["spec"]["containers"]
        assert pods.transfer(container)["kv_role"] == role
        assert pods.transfer(container) == pods.transfer(PODS[f"production-stack {name}"]["spec"]["containers"][0])
        pods.check_volumes(template)
        pods.check_code(template, IMAGE)
        assert pods.matches(policy["spec"]["podSelector"], template["metadata"]["labels"])
        assert list(pods.allowed(policy, templates["pd-deployment-router"]["metadata"]["labels"])) == [
            range(8000, 8001)
        ]
