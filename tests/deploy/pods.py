"""What pods of manifests come to: arguments as their processes see them, ports by name, which pods a selector means."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise

import kubernetes_validate
import yaml

#: The oldest that is still supported upstream where `deploy/` was written for, and the newest with a schema.
VERSIONS = ("1.31", "1.37")
NAMESPACE = "default"
KEY_PATH = "/etc/kvconnect/key"


def load(text):
    return [document for document in yaml.safe_load_all(text) if document]


def check(documents):
    """Validate against both versions; fields that Kubernetes does not know are errors."""
    for document in documents:
        for version in VERSIONS:
            assert kubernetes_validate.validate(document, version, strict=True) == version


def of_kind(documents, kind):
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def pods(documents):
    """Return the pod templates of all deployments, by the deployment's name."""
    return {name: found["spec"]["template"] for name, found in of_kind(documents, "Deployment").items()}


def matches(selector, labels):
    """Whether a selector, of a Service (plain labels) or as in a NetworkPolicy, means a pod with ``labels``."""
    wanted = selector.get("matchLabels", {} if "matchExpressions" in selector else selector)
    rules = {"In": lambda rule: labels.get(rule["key"]) in rule["values"], "Exists": lambda rule: rule["key"] in labels}
    expressions = selector.get("matchExpressions", [])
    return wanted.items() <= labels.items() and all(rules[rule["operator"]](rule) for rule in expressions)


def environment(container, pod_ip):
    """Return a container's variables as the kubelet makes them, each by those before it; secrets are absent."""
    found = {}
    for row in container.get("env", []):
        if "value" in row:
            found[row["name"]] = expand(row["value"], found)
        elif "fieldRef" in row["valueFrom"]:
            fields = {"status.podIP": pod_ip, "metadata.namespace": NAMESPACE}
            found[row["name"]] = fields[row["valueFrom"]["fieldRef"]["fieldPath"]]
    return found


def expand(text, variables):
    return re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], text)


def arguments(container, pod_ip="10.1.2.3"):
    """Return the command line as the process gets it; what KServe's preset appends goes through its shell."""
    variables = environment(container, pod_ip)
    words = [expand(word, variables) for word in (*container.get("command", []), *container.get("args", []))]
    return words + shlex.split(variables.get("VLLM_ADDITIONAL_ARGS", ""))


def option(words, name):
    """Return the value of ``--name=value`` or ``--name value``; it is given once."""
    found = [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    found += [value for word, value in pairwise(words) if word == name]
    (value,) = found
    return value


def transfer(container, pod_ip="10.1.2.3"):
    """Return the KV transfer configuration that an engine's container gives vLLM."""
    return json.loads(option(arguments(container, pod_ip), "--kv-transfer-config"))


def ports(container):
    return {row["name"]: row["containerPort"] for row in container.get("ports", [])}


def allowed(policy, labels):
    """Return the ranges of ports at which a pod with ``labels`` may come in."""
    for rule in policy["spec"]["ingress"]:
        if any(matches(peer["podSelector"], labels) for peer in rule["from"] if "podSelector" in peer):
            yield from (range(row["port"], row.get("endPort", row["port"]) + 1) for row in rule["ports"])


def check_volumes(template):
    """Every mount is of a volume, and a mounted key is one that kvconnect takes: not for everybody, yet readable."""
    spec = template["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for container in (*spec["containers"], *spec.get("initContainers", [])):
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes.keys()
    (main,) = spec["containers"]
    places = {mount["mountPath"]: volumes[mount["name"]] for mount in main["volumeMounts"]}
    secret = places["/etc/kvconnect"]["secret"]
    assert secret["defaultMode"] == 0o440
    assert spec["securityContext"]["fsGroup"]
    assert [item["path"] for item in secret["items"]] == ["key"]


def check_code(template, image):
    """The init container puts kvconnect where the engine's Python looks for it."""
    spec = template["spec"]
    (init,), (main,) = spec["initContainers"], spec["containers"]
    assert init["image"] == image
    source, target = init["command"][-2:]
    assert init["command"][0] == "cp"
    assert source == "/opt/kvconnect/.", "as deploy/Dockerfile has it"
    (written,) = [mount["name"] for mount in init["volumeMounts"] if mount["mountPath"] == target]
    (read,) = [mount["mountPath"] for mount in main["volumeMounts"] if mount["name"] == written]
    assert environment(main, "10.1.2.3")["PYTHONPATH"] == read
