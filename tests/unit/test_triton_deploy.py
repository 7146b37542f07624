"""The files for containers and clusters: nothing runs them here, so schema and promises are checked."""

import re

import pytest
from conftest import ROOT

yaml = pytest.importorskip("yaml", reason="needs the test extra")

DEPLOY = ROOT / "triton_repo" / "deploy"
MANIFESTS = [part for part in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()) if part]
COMPOSE = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())


def manifest(kind):
    (found,) = [part for part in MANIFESTS if part["kind"] == kind]
    return found


@pytest.mark.parametrize("part", MANIFESTS, ids=[part["kind"] for part in MANIFESTS])
def test_every_manifest_is_what_kubernetes_takes(part):
    validate = pytest.importorskip("kubernetes_validate", reason="needs the test extra")
    validate.validate(part, "1.31", strict=True)


def test_the_schema_would_notice_a_wrong_key():
    validate = pytest.importorskip("kubernetes_validate", reason="needs the test extra")
    wrong = {**manifest("Service"), "spec": {**manifest("Service")["spec"], "port": 1}}
    with pytest.raises(validate.ValidationError, match="port"):
        validate.validate(wrong, "1.31", strict=True)


def test_a_pod_has_a_gpu_probes_and_its_volumes():
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["resources"]["limits"]["memory"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] in ports
        assert asked["path"] == f"/v2/health/{'live' if probe == 'livenessProbe' else 'ready'}"
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == volumes
    assert mounts["bundle"] == "/bundle"
    assert mounts["shared-memory"] == "/dev/shm"


def test_scaling_follows_the_queue():
    (metric,) = manifest("HorizontalPodAutoscaler")["spec"]["metrics"]
    (rule,) = yaml.safe_load(manifest("ConfigMap")["data"]["rules.yaml"])
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    assert "nv_inference_queue_duration_us" in rule["metricsQuery"]
    target = manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifest("Deployment")["metadata"]["name"])


def test_labels_select_what_they_mean():
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    for selector in (
        manifest("Deployment")["spec"]["selector"]["matchLabels"],
        manifest("Service")["spec"]["selector"],
        manifest("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    named = {port["name"] for port in manifest("Deployment")["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in manifest("Service")["spec"]["ports"]} == named


def test_compose_has_a_gpu_a_probe_and_ports_for_this_computer_alone():
    (service,) = COMPOSE["services"].values()
    known = {"build", "image", "command", "ports", "volumes", "shm_size", "mem_limit", "deploy", "healthcheck"}
    known |= {"stop_grace_period", "restart", "cap_drop", "security_opt"}
    assert set(service) <= known
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "/v2/health/ready" in service["healthcheck"]["test"][-1]
    targets = {volume["target"]: volume for volume in service["volumes"]}
    assert targets["/bundle"]["read_only"] is True
    assert targets["/repository"]["source"] in COMPOSE["volumes"]
    assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_options_of_the_containers_exist():
    """Arguments of image, composition and cluster are the server command's."""
    from triton_repo.serve import _parser

    dockerfile = (DEPLOY / "Dockerfile").read_text()
    (fixed,) = re.findall(r"ENTRYPOINT (\[.*?\])", dockerfile.replace("\\\n", ""), re.DOTALL)
    start = yaml.safe_load(fixed)
    assert start[0] == "python3"
    assert (ROOT / start[1].removeprefix("/app/")).is_file()
    (service,) = COMPOSE["services"].values()
    container = manifest("Deployment")["spec"]["template"]["spec"]["containers"][0]
    for given in (service["command"], container["args"]):
        options = _parser().parse_args([*start[2:], *given])
        assert (str(options.bundle), options.address, options.gpus) == ("/bundle", "0.0.0.0", (0,))
