"""Kubernetes manifests and the image: valid by the schemas of Kubernetes, and true to what the program does."""

import copy
import re
import subprocess

import jsonschema
import kubernetes_validate
import pytest
import yaml

from m6rec_jax.cli import REQUEUE, VERBS, WRONG_INPUT
from m6rec_jax.cli.processes import BY_HAND, JOIN_SECONDS
from m6rec_jax.settings import load_config
from tests.launch.places import LAUNCH, ROOT, settings

FILES = sorted((LAUNCH / "kubernetes").glob("*.yaml"))
DOCUMENTS = [(path.name, one) for path in FILES for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
JOBSETS = {name: one for name, one in DOCUMENTS if one["kind"] == "JobSet"}
RELEASES = ("1.31", "1.37")

# What JobSet's own API (jobset.x-k8s.io/v1alpha2) allows of the fields that are used here: no package holds its schema.
NAME = {"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$"}
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
TRUTH = {"type": "boolean"}


def closed(required=(), **properties):
    """An object that has no other fields."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


JOBSET = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed(["name"], name=NAME, annotations={"type": "object", "additionalProperties": {"type": "string"}}),
    spec=closed(
        ["replicatedJobs"],
        network=closed(enableDNSHostnames=TRUTH, publishNotReadyAddresses=TRUTH, subdomain=NAME),
        failurePolicy=closed(
            maxRestarts={"type": "integer", "minimum": 0},
            rules={
                "type": "array",
                "items": closed(
                    ["name", "action"],
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:-]{0,126}[A-Za-z0-9_])?$"},
                    action={"enum": ACTIONS},
                    onJobFailureReasons={"type": "array", "items": {"enum": REASONS}},
                    targetReplicatedJobs={"type": "array", "items": NAME},
                ),
            },
        ),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": closed(["name", "template"], name=NAME, replicas={"type": "integer", "minimum": 1}, template={"type": "object"}),
        },
    ),
)  # fmt: skip


def as_job(jobset):
    """The Job that JobSet makes of its only template, as Kubernetes gets it."""
    (one,) = jobset["spec"]["replicatedJobs"]
    name = f"{jobset['metadata']['name']}-{one['name']}-0"
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, **one["template"]}


JOBS = {
    name: as_job(one) if one["kind"] == "JobSet" else one for name, one in DOCUMENTS if one["kind"] in ("Job", "JobSet")
}


def container(job):
    (one,) = job["spec"]["template"]["spec"]["containers"]
    return one


def options(job):
    """--name=value of the container's arguments."""
    return dict(word.removeprefix("--").split("=", 1) for word in container(job)["args"][1:])


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(("name", "document"), DOCUMENTS, ids=[f"{name}-{one['kind']}" for name, one in DOCUMENTS])
def test_kubernetes_knows_every_field(name, document, release):
    if document["kind"] == "JobSet":
        jsonschema.validate(document, JOBSET)
        document = as_job(document)
    kubernetes_validate.validate(document, release, strict=True)
    wrong = copy.deepcopy(document) | {"specification": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, release, strict=True)


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_exit_codes_mean_to_kubernetes_what_they_mean_to_the_program(job):
    policy = {}
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container(job)["name"]
            policy |= dict.fromkeys(rule["onExitCodes"]["values"], rule["action"])
        else:
            policy[rule["onPodConditions"][0]["type"]] = rule["action"]
    assert policy == {WRONG_INPUT: "FailJob", REQUEUE: "Ignore", "DisruptionTarget": "Ignore"}
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # the policy is only asked then


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_a_pod_has_no_rights_that_it_does_not_need(job):
    pod = job["spec"]["template"]["spec"]
    accounts = {one["metadata"]["name"]: one for _, one in DOCUMENTS if one["kind"] == "ServiceAccount"}
    bound = {who["name"] for _, one in DOCUMENTS if one["kind"] == "RoleBinding" for who in one["subjects"]}
    assert pod["serviceAccountName"] in accounts and pod["serviceAccountName"] not in bound
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    security = container(job)["securityContext"]
    assert security == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    written = {mount["mountPath"] for mount in container(job)["volumeMounts"]}
    assert "/tmp" in written and all(path.startswith(("/m6rec", "-")) for path in options(job).values() if "/" in path)


@pytest.mark.parametrize("jobset", JOBSETS.values(), ids=JOBSETS)
def test_the_processes_of_a_jobset_find_each_other(jobset):
    job = as_job(jobset)
    environment = {one["name"]: one for one in container(job)["env"]}
    assert {*BY_HAND, JOIN_SECONDS} == environment.keys()
    host, port = environment[BY_HAND[0]]["value"].split(":")
    assert host == f"{job['metadata']['name']}-0.{jobset['metadata']['name']}"  # pod 0, in the headless service
    assert jobset["spec"]["network"]["enableDNSHostnames"] and jobset["spec"]["network"]["publishNotReadyAddresses"]
    assert [one["containerPort"] for one in container(job)["ports"]] == [int(port)]
    count = int(environment[BY_HAND[1]]["value"])
    assert count == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert job["spec"]["completionMode"] == "Indexed" and jobset["spec"]["replicatedJobs"][0]["replicas"] == 1
    field = environment[BY_HAND[2]]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert job["spec"]["backoffLimit"] == 0  # a crash ends the Job, so that JobSet begins all pods again, together


def test_a_tpu_slice_has_as_many_chips_as_its_topology_says():
    job = JOBS["train-tpu.yaml"]
    selector = job["spec"]["template"]["spec"]["nodeSelector"]
    rows, columns = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == container(job)["resources"]["limits"]["google.com/tpu"] * job["spec"]["completions"]


def test_each_pod_of_a_batch_has_its_shard():
    job = JOBS["generate.yaml"]
    said = options(job)
    assert said["shard"] == "$(JOB_COMPLETION_INDEX)"  # Kubernetes fills it in, from 0
    assert int(said["shards"]) == job["spec"]["completions"]
    assert job["spec"]["completionMode"] == "Indexed"


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_the_arguments_are_those_of_the_command(job, capsys):
    from m6rec_jax.cli import main

    verb, *words = container(job)["args"]
    assert verb in VERBS
    if "config" in options(job):
        load_config([options(job)["config"]])
    main([verb, *[word.replace("$(JOB_COMPLETION_INDEX)", "0").replace("/m6rec/", "/nowhere/") for word in words]])
    assert "/nowhere/" in capsys.readouterr().err  # it read all options and stopped at the first folder


def test_the_files_of_flags_are_named_as_they_are():
    for name, flags in (("train-gpu.yaml", "h100.env"), ("train-tpu.yaml", "tpu.env")):
        text = (LAUNCH / "kubernetes" / name).read_text(encoding="utf-8")
        made = re.search(r"create configmap (\S+) --from-env-file launch/env/(\S+)", text)
        assert made is not None and made[2] == flags and settings(flags)
        assert container(JOBS[name])["envFrom"] == [{"configMapRef": {"name": made[1]}}]


# -- the image ---------------------------------------------------------------------------------------------------------

DOCKERFILE = (LAUNCH / "Dockerfile").read_text(encoding="utf-8")
STEPS = re.findall(r"^([A-Z]+) (.*)$", DOCKERFILE.replace("\\\n", " "), re.M)


def test_the_image_installs_hashed_wheels_only():
    installs = [what for step, what in STEPS if step == "RUN" and "pip install" in what]
    assert len(installs) == 2
    assert all({"--no-deps"} <= set(what.split()) for what in installs)
    assert {"--only-binary", ":all:", "--require-hashes"} <= set(installs[0].split())
    assert "--no-index" in installs[1]  # the checkout itself needs nothing more
    for lock in ("cuda", "tpu", "core"):
        assert (ROOT / f"requirements/{lock}.lock").is_file()
        assert lock in DOCKERFILE


def test_the_image_is_not_root_and_knows_no_secret():
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", last, re.M) == ["1000:1000"]
    assert last.index("USER ") < last.index("ENTRYPOINT")
    assert 'ENTRYPOINT ["m6rec"]' in last  # by itself, so that signals reach it
    assert not re.search(r"(?i)token|password|--index-url|https?:", DOCKERFILE)
    assert not [what for step, what in STEPS if step in ("ADD", "ARG", "ENV") and re.search(r"(?i)secret|key", what)]


def test_only_what_the_image_needs_is_sent_to_the_builder():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    copied = [what.split()[0] for step, what in STEPS if step == "COPY" and "--from" not in what]
    allowed = [line[1:] for line in lines if line.startswith("!")]
    kept = {word.split("/")[0] for word in allowed}
    assert {word.split("/")[0] for word in copied} == kept
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert not tracked or kept <= {path.split("/")[0] for path in tracked}
