"""The manifests say only what Kubernetes, KubeRay and the installed Ray understand, and keep what they promise."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import kubernetes_validate
import pytest
import ray
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from actors.config import Config, load_config
from actors.encoder import EncoderConfig
from actors.engine import EngineConfig
from jobs.capacity_model import LoadConfig, MachineConfig, ServedConfig, streams_per_llm
from serve.app import AppArgs
from serve.gateway import ServeConfig

REPOSITORY = Path(__file__).parents[1]
KUBERNETES = REPOSITORY / "configs" / "kubernetes"
VERSION = "1.32"
SERVE_FILES = [KUBERNETES / "rayservice.yaml", REPOSITORY / "configs" / "serve.yaml"]
KNOWN: dict[str, dict[str, str]] = yaml.safe_load((Path(__file__).parent / "kuberay_fields.yaml").read_text())
BASIC = {"string": str, "boolean": bool, "integer": int, "number": (int, float)}
JOBS = sorted(
    path.parent.name for path in (KUBERNETES / "jobs").glob("*/kustomization.yaml") if path.parent.name != "base"
)


def documents(kind: str = "") -> list[tuple[str, dict]]:
    """All manifests, with the file of each; jobs as their folders change them."""
    found = []
    for path in sorted(KUBERNETES.glob("*.yaml")):
        found += [(path.name, document) for document in yaml.safe_load_all(path.read_text())]
    found += [(f"jobs/{name}", job(name)) for name in JOBS]
    return [item for item in found if item[1]["kind"] == kind or (not kind and item[1]["kind"] != "Kustomization")]


def job(name: str) -> dict:
    """The base with a folder's patches, as `kubectl kustomize` applies them."""
    document = yaml.safe_load((KUBERNETES / "jobs" / "base" / "rayjob.yaml").read_text())
    document = copy.deepcopy(json.loads(json.dumps(document)))  # anchors no longer share what a patch changes
    settings = yaml.safe_load((KUBERNETES / "jobs" / name / "kustomization.yaml").read_text())
    for operation in yaml.safe_load(settings["patches"][0]["patch"]):
        *way, last = [part.replace("~1", "/") for part in operation["path"].strip("/").split("/")]
        place = document
        for part in way:
            place = place[int(part) if isinstance(place, list) else part]
        assert (last in place) == (operation["op"] == "replace"), operation["path"]
        place[last] = operation["value"]
    return document


def problems(value: object, kind: str, where: str) -> Iterator[str]:
    """Where a value is not what KubeRay expects."""
    if kind in BASIC:
        if not isinstance(value, BASIC[kind]) or (kind != "boolean" and isinstance(value, bool)):
            yield f"{where}: {value!r} is no {kind}"
    elif kind == "pod":
        yield from pod_problems(value, where)
    elif kind in KNOWN:
        assert isinstance(value, Mapping), where
        for name, part in value.items():
            if name not in KNOWN[kind]:
                yield f"{where}: {kind} has no field {name}"
            else:
                yield from problems(part, KNOWN[kind][name], f"{where}.{name}")
    elif kind[0] in "[{":
        assert isinstance(value, list if kind[0] == "[" else dict), where
        for name, part in enumerate(value) if isinstance(value, list) else value.items():
            yield from problems(part, kind[1:-1], f"{where}.{name}")
    elif "|" in kind and value not in kind.split("|"):
        yield f"{where}: {value!r}, expected one of {kind}"


def pod_problems(template: dict, where: str) -> Iterator[str]:
    """What Kubernetes has against a pod's template, wrapped into something it has a schema for."""
    labels = template["metadata"]["labels"]
    spec = {"selector": {"matchLabels": labels}, "template": template}
    whole = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "probe"}, "spec": spec}
    try:
        kubernetes_validate.validate(whole, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{where}: {error.message}"


def pods() -> Iterator[tuple[str, dict]]:
    """Every pod's spec, with a name for it."""

    def templates(value: object, where: str) -> Iterator[tuple[str, dict]]:
        if isinstance(value, dict):
            for name, part in value.items():
                if name == "template" and "spec" in part:
                    yield where, part["spec"]
                yield from templates(part, f"{where}.{name}")
        elif isinstance(value, list):
            for number, part in enumerate(value):
                yield from templates(part, f"{where}.{number}")

    for file, document in documents():
        yield from templates(document, f"{file} {document['metadata']['name']}")


def test_every_job_has_a_manifest() -> None:
    assert {"build_dialogues", "encode_frames", "train", "evaluate", "narrate", "benchmark"} <= set(JOBS)
    for name in JOBS:
        command = job(name)["spec"]["entrypoint"].split()
        assert command[:2] == ["python", "-m"]
        assert command[2] == f"jobs.{name}"
        for word in command:
            assert not word.startswith("configs/") or (REPOSITORY / word).is_file(), word


@pytest.mark.parametrize(("file", "document"), documents(), ids=lambda value: value if isinstance(value, str) else "")
def test_manifests_have_only_known_fields_of_the_right_type(file: str, document: dict) -> None:
    if document["apiVersion"].startswith("ray.io/"):
        assert list(problems(document["spec"], KNOWN[document["kind"]]["spec"], file)) == []
    else:
        kubernetes_validate.validate(document, VERSION, strict=True)


def test_a_field_that_does_not_exist_is_found() -> None:
    document = job("train")
    document["spec"]["shutdownAfterJobFinish"] = True
    document["spec"]["backoffLimit"] = "2"
    document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumes"] = []
    found = " ".join(problems(document["spec"], "RayJobSpec", "job"))
    assert "RayJobSpec has no field shutdownAfterJobFinish" in found
    assert "'2' is no integer" in found
    assert "volumes" in found


def test_everything_runs_as_an_ordinary_user_without_rights() -> None:
    for where, spec in pods():
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where
            assert "memory" in container["resources"]["limits"], where


def test_what_the_operator_puts_into_a_pod_of_ours_has_no_rights_either() -> None:
    for kind in ("RayService", "RayJob", "RayCluster"):
        for file, document in documents(kind):
            spec = document["spec"]
            cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec
            if cluster.get("enableInTreeAutoscaling"):
                rights = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
                assert cluster["autoscalerOptions"]["securityContext"] == rights, file
                assert cluster["headGroupSpec"]["template"]["spec"].get("automountServiceAccountToken", True), file


def test_whatever_is_mounted_and_every_secret_is_named_in_one_place() -> None:
    keys = set(re.findall(r"--from-literal=([a-z-]+)=", (REPOSITORY / "docs" / "clusters.md").read_text()))
    for where, spec in pods():
        volumes = {volume["name"] for volume in spec.get("volumes", [])} | {"data"}
        for container in spec["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes, where
            for variable in container.get("env", []):
                secret = variable.get("valueFrom", {}).get("secretKeyRef")
                assert secret is None or (secret["name"], secret["key"] in keys) == ("videollm", True), where


def test_every_image_of_ours_is_where_the_documented_command_puts_the_registry() -> None:
    [pattern] = re.findall(r'sed "s\|([^|]*)\|\$REGISTRY/', (REPOSITORY / "docs" / "clusters.md").read_text())
    for where, spec in pods():
        for container in spec["containers"]:
            assert container["image"].startswith((pattern, "valkey/valkey:")), where


def test_budgets_and_policies_choose_pods_that_exist() -> None:
    labels = []
    for _, document in documents():
        text = json.dumps(document)
        labels += [json.loads(found) for found in re.findall(r'"labels": (\{[^{}]*\})', text)]
    for kind in ("PodDisruptionBudget", "NetworkPolicy", "Service"):
        for _, document in documents(kind):
            spec = document["spec"]
            chosen = spec.get("selector") or spec.get("podSelector")
            wanted = {k: v for k, v in chosen.get("matchLabels", chosen).items() if not k.startswith("ray.io/")}
            assert any(wanted.items() <= found.items() for found in labels), document["metadata"]


def test_a_node_can_be_drained_and_clients_are_served_meanwhile() -> None:
    [(_, service)] = documents("RayService")
    groups = {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    budgets = {document["metadata"]["name"]: document["spec"] for _, document in documents("PodDisruptionBudget")}
    for name, group in groups.items():
        assert budgets[f"{name}s"]["maxUnavailable"] == 1
        assert group["minReplicas"] >= 2, name


def on_gpus(config: Config) -> list[bool]:
    return [
        config.section("engine", EngineConfig).device == "cuda",
        config.section("encoder", EncoderConfig).device == "cuda",
    ]


def test_models_run_on_the_gpus_that_their_pods_have() -> None:
    [application] = serve_config(SERVE_FILES[0])["applications"]
    given = AppArgs.model_validate(application["args"])
    config = load_config(REPOSITORY / given.config, given.overrides)
    assert on_gpus(config) == [True, True]
    for name in JOBS:
        document = json.dumps(job(name))
        [settings] = re.findall(r"configs/\w+\.yaml", document) or [None]
        if settings and "nvidia.com/gpu" in document:
            assert on_gpus(load_config(REPOSITORY / settings)) == [True, True], name


def test_an_llm_device_may_hold_as_many_sessions_as_were_planned_for_it() -> None:
    [application] = serve_config(SERVE_FILES[0])["applications"]
    given = AppArgs.model_validate(application["args"])
    engine = load_config(REPOSITORY / given.config, given.overrides).section("engine", EngineConfig)
    served, machine = ServedConfig(), MachineConfig()
    assert (engine.window_trigger, engine.window_keep) == (served.window, served.kept)
    assert engine.token_budget == machine.step_positions
    assert engine.max_sessions >= streams_per_llm(LoadConfig(), served, machine)[0]


def test_rays_redis_is_not_the_sessions_redis() -> None:
    [(_, service)] = documents("RayService")
    assert service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"] == "redis://redis-gcs:6379"
    assert "redis://:...@redis-data:6379" in (REPOSITORY / "docs" / "clusters.md").read_text()


def serve_config(path: Path) -> dict:
    document = yaml.safe_load(path.read_text().split("\n---\n")[0])
    return yaml.safe_load(document["spec"]["serveConfigV2"]) if "spec" in document else document


def unknown_fields(value: object, schema: type[BaseModel], where: str) -> list[str]:
    """Fields that Ray's schema does not have: it would ignore some of them without a word."""
    found = []
    assert isinstance(value, dict), where
    for name, part in value.items():
        if name not in schema.model_fields:
            found.append(f"{where}.{name}")
            continue
        inner = [kind for kind in models_of(schema.model_fields[name].annotation) if issubclass(kind, BaseModel)]
        for item in part if isinstance(part, list) else [part]:
            if inner and isinstance(item, dict):
                found += min((unknown_fields(item, kind, f"{where}.{name}") for kind in inner), key=len)
    return found


def models_of(annotation: object) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in models_of(part)]


@pytest.mark.parametrize("path", SERVE_FILES, ids=lambda path: path.name)
def test_every_field_of_a_serve_file_is_in_the_installed_ray(path: Path) -> None:
    config = serve_config(path)
    ServeDeploySchema.model_validate(config)
    assert unknown_fields(config, ServeDeploySchema, "") == []
    [application] = config["applications"]
    assert application["import_path"] == "serve.app:build"
    given = AppArgs.model_validate(application["args"])
    settings = load_config(REPOSITORY / given.config, given.overrides)
    assert settings.section("serve", ServeConfig)
    assert {deployment["name"] for deployment in application.get("deployments", [])} <= {"gateway", "encoder", "llm"}


def test_a_misspelt_field_of_a_serve_file_is_found() -> None:
    config = serve_config(SERVE_FILES[0])
    config["http_option"] = {}
    config["applications"][0]["deployments"][0]["num_replica"] = 1
    config["applications"][0]["deployments"][0]["ray_actor_options"]["cpus"] = 1
    found = unknown_fields(config, ServeDeploySchema, "")
    assert found == [
        ".applications.deployments.ray_actor_options.cpus",
        ".applications.deployments.num_replica",
        ".http_option",
    ]


def test_a_deployment_fits_into_its_group() -> None:
    [(_, service)] = documents("RayService")
    groups = {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    for deployment in serve_config(SERVE_FILES[0])["applications"][0]["deployments"]:
        group, options = groups[deployment["name"]], deployment["ray_actor_options"]
        offered = json.loads(group["rayStartParams"]["resources"].strip("'").replace('\\"', '"').strip('"'))
        assert options["resources"] == offered == {deployment["name"]: 1}
        assert options["num_cpus"] <= int(group["rayStartParams"]["num-cpus"])
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert options.get("num_gpus", 0) == limits.get("nvidia.com/gpu", 0)
        assert group["minReplicas"] <= deployment["num_replicas"] <= group["maxReplicas"]


def test_manifests_name_the_installed_ray() -> None:
    for kind in ("RayService", "RayJob", "RayCluster"):
        for file, document in documents(kind):
            spec = document["spec"]
            cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec
            assert cluster["rayVersion"] == ray.__version__, file
            assert cluster["authOptions"] == {"mode": "token"}, file
