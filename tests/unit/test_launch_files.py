"""Checks the files of launch/ without a cluster: against schemas, and by running their scripts with stand-ins."""

import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from stack.config.compose import compose
from stack.config.schema import Config
from stack.plan.layout import make_plan

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
MANIFESTS = sorted(LAUNCH.glob("kubernetes/*.yaml"))
SBATCH = LAUNCH / "slurm" / "train.sbatch"
#: The oldest version of Kubernetes that has every field, and the newest one for which there are schemas.
KUBERNETES = ("1.31", "1.37")
#: Names of variables for secrets; and values that look like secrets: a known prefix, or a long word of letters and
#: digits.
SECRET_NAME = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL", re.IGNORECASE)
SECRET_VALUE = re.compile(r"hf_\w{8}|AKIA\w{8}|ghp_\w{8}|-----BEGIN|\b(?=\w*\d)(?=\w*[a-z])\w{32,}\b", re.IGNORECASE)


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def document(name: str, kind: str) -> dict[str, Any]:
    (found,) = [d for d in documents(LAUNCH / "kubernetes" / name) if d["kind"] == kind]
    return found


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod spec inside a document."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    else:
        yield str(value)


def container(name: str) -> dict[str, Any]:
    """The container of a manifest's pods, with all settings that it would get."""
    if name == "trainjob.yaml":
        (pod,) = pods(document(name, "TrainingRuntime"))
        trainer = document(name, "TrainJob")["spec"]["trainer"]
        env = [*pod["containers"][0]["env"], *trainer["env"]]
        return {**pod["containers"][0], **trainer, "resources": trainer["resourcesPerNode"], "env": env}
    (pod,) = pods(document(name, "Job"))
    return pod["containers"][0]


def environment(name: str) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(name)["env"] if "value" in entry}


def config(name: str) -> Config:
    return compose(container(name)["args"])


# Schemas.


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_kubernetes_takes_its_own_kinds(file, version):
    for found in documents(file):
        if not found["apiVersion"].startswith("trainer.kubeflow.org/"):
            kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("kind", ["TrainJob", "TrainingRuntime"])
def test_kubeflow_takes_its_kinds(kind):
    found = document("trainjob.yaml", kind)

    read = getattr(models, f"TrainerV1alpha1{kind}").from_dict(found)

    assert found["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    # The models of the package drop unknown fields, so an equal result means that all fields are known.
    assert json.loads(json.dumps(read.to_dict())) == found


def test_a_misspelled_field_is_found():
    job = document("job.yaml", "Job")
    job["spec"]["completionmode"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES[0], strict=True)
    train = document("trainjob.yaml", "TrainJob")
    train["spec"]["trainer"]["numnodes"] = 2
    assert models.TrainerV1alpha1TrainJob.from_dict(train).to_dict() != train


def test_the_pods_of_a_training_runtime_are_pods():
    """Checked with the schema of Kubernetes, which is stricter than the models of Kubeflow's package."""
    job = document("trainjob.yaml", "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]
    kubernetes_validate.validate(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": job["spec"]},
        KUBERNETES[0],
        strict=True,
    )


# The content of the manifests.


@pytest.mark.parametrize("name", ["job.yaml", "trainjob.yaml"])
def test_the_training_is_a_legal_layout_of_the_pods(name):
    if name == "job.yaml":
        hosts, gpus = int(environment(name)["NODES"]), int(environment(name)["GPUS"])
        job = document(name, "Job")["spec"]
        assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", hosts, hosts)
    else:
        trainer = document(name, "TrainJob")["spec"]["trainer"]
        hosts, gpus = trainer["numNodes"], trainer["numProcPerNode"]
        assert document(name, "TrainingRuntime")["spec"]["mlPolicy"] == {"numNodes": hosts, "torch": {}}
    cfg = config(name)

    plan = make_plan(cfg, hosts * gpus)

    assert (cfg.launch.nodes, cfg.launch.ranks_per_node) == (hosts, gpus)
    assert make_plan(cfg).world_size == plan.world_size
    assert container(name)["resources"]["limits"]["nvidia.com/gpu"] == gpus


@pytest.mark.parametrize("name", ["job.yaml", "trainjob.yaml"])
def test_the_corpus_that_is_prepared_is_the_one_that_is_looked_for(name):
    assert container("data.yaml")["command"] == ["stack", "data"]
    assert config("data.yaml").data == config(name).data


@pytest.mark.parametrize("name", ["job.yaml", "trainjob.yaml"])
def test_all_that_must_last_is_on_the_shared_volume(name):
    paths = [environment(name)["RUNS"], config(name).data.root, environment("data.yaml")["HF_HOME"]]
    assert all(path.startswith("/shared/") for path in paths)
    claim = document("data.yaml", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for file in MANIFESTS:
        for pod in (pod for found in documents(file) for pod in pods(found)):
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
            assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


@pytest.mark.parametrize("name", ["job.yaml", "trainjob.yaml"])
def test_pods_of_training(name):
    (pod,) = [pod for found in documents(LAUNCH / "kubernetes" / name) for pod in pods(found)]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    # torchrun must have time to kill the remaining ranks before Kubernetes kills the pod.
    assert int(environment(name)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]


def test_the_pods_find_the_first_one():
    service, job = document("job.yaml", "Service"), document("job.yaml", "Job")
    name = job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert environment("job.yaml")["MASTER"] == f"{name}-0.{service['metadata']['name']}"


@pytest.mark.parametrize("name", [file.name for file in MANIFESTS])
def test_resources_are_limited(name):
    assert {"cpu", "memory"} <= set(container(name)["resources"]["limits"])


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_pods_run_as_the_user_of_the_image(file):
    dockerfile = (LAUNCH / "Dockerfile").read_text()
    for pod in (pod for found in documents(file) for pod in pods(found)):
        assert pod["securityContext"]["runAsNonRoot"]
        assert f"\nUSER {pod['securityContext']['runAsUser']}\n" in dockerfile
        assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


def test_images_are_pinned_and_one():
    images = {found["image"] for file in MANIFESTS for found in _with_image(documents(file))}
    (built,) = re.findall(r"^# docker build .* -t (\S+) \.$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    assert images == {built}
    (base,) = re.findall(r"^FROM (\S+)$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    assert all(re.search(r":\d+\.\d+\.\d+[\w.-]*$", image) for image in (built, base))
    # pip keeps the torch of the base image only if it has this version.
    (torch,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert base.startswith(f"pytorch/pytorch:{torch}-")


def _with_image(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "image" in value:
            yield value
        value = list(value.values())
    for inner in value if isinstance(value, list) else []:
        yield from _with_image(inner)


def test_no_file_has_a_secret():
    for file in MANIFESTS:
        for found in documents(file):
            assert found["kind"] != "Secret"
            assert not [text for text in strings(found) if SECRET_VALUE.search(text)]
        for entry in container(file.name)["env"]:
            assert not SECRET_NAME.search(entry["name"]) or "secretKeyRef" in entry["valueFrom"], entry["name"]
    for file in (LAUNCH / "Dockerfile", SBATCH, LAUNCH / "hosts.example"):
        assert not SECRET_VALUE.search(file.read_text())


def test_the_image_copies_what_it_installs():
    copied = re.findall(r"^COPY (.*) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    places = about["tool"]["setuptools"]["package-dir"]
    folders = {places.get(package, package).split(".")[0] for package in about["tool"]["setuptools"]["packages"]}
    assert names == {"pyproject.toml", "constraints.txt", about["project"]["readme"], "LICENSE", *folders}
    assert all((ROOT / name).exists() for name in names)


def test_overrides_in_comments_compose():
    for file in (SBATCH, LAUNCH / "hosts.example"):
        lines = re.sub(r"\\\n#", "", file.read_text()).splitlines()
        commands = [line for line in lines if re.match(r"#\s+(stack|sbatch|deepspeed) .*experiment=", line)]
        assert len(commands) == 2
        configs = [compose(re.findall(r"(?<= )[a-z_.]+=\S+", command)) for command in commands]
        assert configs[0].data == configs[1].data


def test_hosts_are_what_the_launcher_reads():
    lines = (LAUNCH / "hosts.example").read_text().splitlines()
    hosts = [line for line in lines if not line.startswith("#")]
    assert hosts
    assert all(re.fullmatch(r"\S+ slots=\d+", line) for line in hosts)


# The scripts, run with stand-ins for the programs that they start.


class Stage:
    """A folder of stand-in programs that record their calls, and a folder of runs."""

    def __init__(self, folder: Path):
        self.programs, self.runs, self._calls = folder / "bin", folder / "runs", folder / "calls"
        self.programs.mkdir()
        self.programs.joinpath("python").write_text(f'#!/bin/bash\nprintf "python %s\\n" "$*" >> {self._calls}\n')
        self._executable("python")

    def program(self, name: str, code: int = 0, also: str = ":") -> None:
        text = f'#!/bin/bash\nprintf "{name} %s\\n" "$*" >> {self._calls}\n{also}\nexit {code}\n'
        self.programs.joinpath(name).write_text(text)
        self._executable(name)

    def _executable(self, name: str) -> None:
        self.programs.joinpath(name).chmod(0o755)

    def run(self, command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        path = f"{self.programs}:{os.environ['PATH']}"
        env = {"PATH": path, **env}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def made(self, run_id: str, *, name: str = "llama-8b", done: bool = False) -> Path:
        """Makes a run of an earlier start, and other folders that must not be mistaken for a run."""
        run = self.runs / name / run_id
        for folder in (run, run / "attempts" / "1", run / "evaluations" / "e"):
            self._made(folder)
        self.looked_at()
        if done:
            (run / "DONE.json").touch()
        return run

    def looked_at(self, *, done: bool = True) -> None:
        """Makes the folders that `stack doctor` and `stack eval` of an export leave, both newer than any run."""
        for folder, file in (("doctor", "check.json"), ("evaluations", "evaluation.json")):
            self._made(self.runs / folder / "20260909-000000-ffff")
            (self.runs / folder / "20260909-000000-ffff" / file).touch()
            if done:
                (self.runs / folder / "20260909-000000-ffff" / "DONE.json").touch()

    def _made(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").touch()


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


@pytest.fixture(params=["job.yaml", "trainjob.yaml"])
def pod(request, stage):
    """A function that runs the command of the pods."""
    found = container(request.param)

    def start() -> subprocess.CompletedProcess:
        env = {**environment(request.param), "RUNS": str(stage.runs), "JOB_COMPLETION_INDEX": "1"}
        return stage.run([*found["command"], *found["args"]], env)

    return start


def test_a_pod_begins_a_run(pod, stage):
    assert pod().returncode == 0
    (call,) = stage.calls
    assert call.startswith("python -m torch.distributed.run ")
    overrides = call.partition("-m stack.train ")[2].split()
    assert compose(overrides).run.root == str(stage.runs)


@pytest.mark.parametrize("done", [True, False])
def test_a_check_and_an_evaluation_are_no_runs(pod, sbatch, stage, done):
    stage.looked_at(done=done)
    assert pod().returncode == 0
    assert sbatch(0).returncode == 0
    # Both begin a new run, with their overrides and without --config.
    assert " -m stack.train experiment=8b " in stage.calls[0]
    assert stage.calls[0].endswith(f" run.root={stage.runs}")
    assert stage.calls[-1].endswith(f" stack experiment=8b run.root={stage.runs}")


def test_a_pod_goes_on_with_the_newest_run(pod, stage):
    stage.made("20260101-000000-ffff", name="zephyr", done=True)
    newest = stage.made("20260102-000000-0000", name="8b")
    assert pod().returncode == 0
    assert stage.calls[0].endswith(f" -m stack.train --config {newest}/config.yaml")


def test_a_pod_that_comes_back_after_the_end_waits_for_nobody(pod, stage):
    stage.made("20260101-000000-ffff", done=True)
    assert pod().returncode == 0
    assert stage.calls == []


def test_the_pods_of_a_job_have_their_places(stage):
    found = container("job.yaml")
    env = {**environment("job.yaml"), "RUNS": str(stage.runs), "JOB_COMPLETION_INDEX": "1"}
    stage.run([*found["command"], *found["args"]], env)
    place = "--nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr stack-0.stack --master-port 29500"
    assert place in stage.calls[0]


@pytest.mark.parametrize("name", ["job.yaml", "trainjob.yaml"])
def test_torchrun_gets_the_signals_of_a_pod(name):
    script = container(name)["command"][2]
    assert re.search(r"^exec python -m torch\.distributed\.run ", script, re.MULTILINE)
    # Kubernetes would replace $$ and $(NAME) before the shell sees them.
    assert "$$" not in script
    assert not re.search(r"\$\(\w+\)", script)


SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "node-[0-1]",
    "SLURM_CPUS_PER_TASK": "12",
    "SLURM_NTASKS": "16",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def sbatch(stage):
    """`sbatch(code, *arguments)` runs the script with an srun that ends with `code`."""

    def start(code: int, *arguments: str) -> subprocess.CompletedProcess:
        stage.program("srun", code)
        stage.program("scontrol", also='if [ "$1" = show ]; then printf "node-0\\nnode-1\\n"; fi')
        return stage.run(["bash", str(SBATCH), *(arguments or (str(stage.runs), "experiment=8b"))], SLURM)

    return start


def test_scripts_are_bash():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    for name in ("job.yaml", "trainjob.yaml"):
        subprocess.run(["bash", "-n", "-c", container(name)["command"][2]], check=True)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (9, False), (75, True), (137, False)])
def test_a_job_is_requeued_when_its_ranks_ask_for_it(sbatch, stage, code, requeued):
    assert sbatch(code).returncode == code
    assert ("scontrol requeue 123456" in stage.calls) == requeued


def test_a_job_that_cannot_be_requeued_says_so(stage, sbatch):
    sbatch(75)
    stage.program("scontrol", code=1, also='if [ "$1" = show ]; then echo node-0; exit 0; fi')
    ended = stage.run(["bash", str(SBATCH), str(stage.runs), "experiment=8b"], SLURM)
    assert ended.returncode == 75
    assert "not requeued" in ended.stderr


def test_a_requeued_job_goes_on(sbatch, stage):
    stage.made("20260101-000000-ffff", name="zephyr", done=True)
    newest = stage.made("20260102-000000-0000", name="a name, with blanks")
    sbatch(0)
    # One of srun's arguments has several lines, so only the end of the call is compared.
    assert stage.calls[-1].endswith(f" stack --config {newest}/config.yaml")


def test_a_job_after_the_end_starts_nothing(sbatch, stage):
    stage.made("20260102-000000-0000", done=True)
    assert sbatch(0).returncode == 0
    assert stage.calls == []


def test_a_task_is_a_rank(stage):
    stage.program("scontrol", also='printf "node-0\\nnode-1\\n"')
    # Like srun: skips options, then runs the task's command.
    run = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
    stage.program("srun", also=run)
    told = 'printf "%s\\n" "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"'
    stage.program("python", also=told)

    ended = stage.run(["bash", str(SBATCH), str(stage.runs), "experiment=8b", "data.paths=[a b]"], SLURM)

    assert ended.stdout.split() == ["9", "1", "16", "8", "node-0", "23456"]
    assert stage.calls[-1] == f"python -m stack.train experiment=8b data.paths=[a b] run.root={stage.runs}"


@pytest.mark.parametrize("arguments", [[], ["experiment=8b"]], ids=["nothing", "overrides alone"])
def test_the_folder_of_the_run_is_asked_for(stage, arguments):
    ended = stage.run(["bash", str(SBATCH), *arguments], SLURM)
    assert ended.returncode == 2
    assert "usage: sbatch" in ended.stderr


def test_the_allocation_is_a_legal_layout():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SBATCH.read_text(), re.MULTILINE))
    (example,) = re.findall(r"^#   sbatch \S+ \S+ (.*)$", SBATCH.read_text(), re.MULTILINE)
    cfg = compose(example.split())
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert make_plan(cfg).world_size == int(options["nodes"]) * int(options["ntasks-per-node"])
    assert re.search(r"^#SBATCH --requeue$", SBATCH.read_text(), re.MULTILINE)
