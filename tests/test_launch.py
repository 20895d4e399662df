"""Each launch recipe, run with programs in place of torchrun and the scheduler that only say how they were called."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser  # noqa: TID251  its arguments, and no ranks

from transfusion.cli import parse
from transfusion.cluster import Cluster
from transfusion.config import load_config
from transfusion.data.loader import micro_batches
from transfusion.run import RunConfig

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SAY = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["SAID"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""
FAKES = {  # of Slurm: srun runs its command once, as on one node; scontrol knows the nodes; scancel signals the steps
    "torchrun": SAY,
    "scancel": SAY,
    "srun": '#!/bin/bash\nsay srun "$@"\nwhile [[ $1 = --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": '#!/bin/bash\nif [[ $1 = show ]]; then printf "node1\\nnode2\\n"; else exec say "$@"; fi\n',
    "say": SAY,
}


def run(tmp_path: Path, script: list[str], **environment: str) -> list[list[str]]:
    """The calls of the programs in FAKES that say so, in their order."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in FAKES.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    said = tmp_path / "said"
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "SAID": str(said)}
    subprocess.run(["bash", *script], check=True, cwd=ROOT, env=os.environ | path | environment, timeout=60)
    return [json.loads(line) for line in said.read_text().splitlines()]


def slurm_directives() -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (LAUNCH / "slurm.sbatch").read_text(), re.M)
    return dict(lines)


def of_slurm() -> dict[str, str]:
    """The environment that Slurm gives a job with these directives."""
    asked = slurm_directives()
    return {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": asked["nodes"],
        "SLURM_GPUS_PER_NODE": asked["gpus-per-node"],
        "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
        "SLURM_JOB_ID": "7",
    }


def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def skypilot() -> dict:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def told(recipe: str, tmp_path: Path) -> tuple[list[str], int]:
    """(what torchrun is told, how many GPUs the recipe asks for); configs are those that the headers name."""
    if recipe == "node.sh":
        words = ["configs/paper-1.4b-linear.toml", "out=runs/1.4b"]
        ((_, *arguments),) = run(tmp_path, [str(LAUNCH / recipe), *words], GPUS="8")
        return arguments, 8
    if recipe == "nodes.sh":
        words = ["configs/paper-7b-linear.toml", "out=/shared/runs/7b"]
        ((_, *arguments),) = run(tmp_path, [str(LAUNCH / recipe), *words], NODES="4", HEAD="10.0.0.1")
        return arguments, 4 * 8
    if recipe == "slurm.sbatch":
        words = ["configs/paper-7b-linear.toml", "out=/shared/runs/7b"]
        (_, _, *of_srun), (_, *arguments) = run(tmp_path, [str(LAUNCH / recipe), *words], **of_slurm())
        asked = slurm_directives()
        assert f"--cpus-per-task={asked['cpus-per-task']}" in of_srun, "srun inherits it not"
        return arguments, int(asked["nodes"]) * int(asked["gpus-per-node"])
    if recipe == "jobset.yaml":
        (job,) = jobset()["spec"]["replicatedJobs"]
        spec = job["template"]["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        assert container["command"][0] == "torchrun" and spec["completions"] == spec["parallelism"]
        return container["command"][1:], spec["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
    task = skypilot()
    nodes, gpus = task["num_nodes"], int(task["resources"]["accelerators"].split(":")[1])
    given = {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus), "SKYPILOT_NODE_IPS": "a\nb"}
    ((_, *arguments),) = run(tmp_path, ["-euc", task["run"]], **given, **task["envs"])
    return arguments, nodes * gpus


RECIPES = sorted(path.name for path in LAUNCH.iterdir())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_starts_a_rank_on_each_gpu_to_train_a_config_whose_rows_they_can_share(recipe, tmp_path):
    arguments, gpus = told(recipe, tmp_path)
    args = get_args_parser().parse_args(arguments)  # leaves by SystemExit where it does not understand
    assert (args.module, args.training_script) == (True, "transfusion.cli")
    assert args.standalone or (args.rdzv_backend == "c10d" and args.rdzv_id)
    assert args.standalone or re.fullmatch(r"[\w.-]+:29500", args.rdzv_endpoint), "one machine"
    assert (1 if args.standalone else int(args.nnodes)) * int(args.nproc_per_node) == gpus
    assert args.max_restarts > 0
    assert "SIGTERM" in args.signals_to_handle and "SIGUSR1" in args.signals_to_handle
    assert 30 < args.shutdown_timeout < 120, "a step and a checkpoint, within the patience of schedulers"
    train = parse(args.training_script_args)
    assert train.command == "train" and train.resume
    config = load_config(RunConfig, ROOT / train.config, train.overrides)
    assert micro_batches(config.train.rows, config.train.micro_batch, gpus)
    assert Cluster(gpus, config.parallel.shards)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not r.endswith(".yaml")])
def test_a_script_is_valid_and_its_header_shows_how_it_is_called(recipe):
    subprocess.run(["bash", "-n", str(LAUNCH / recipe)], check=True)
    assert os.access(LAUNCH / recipe, os.X_OK)
    assert re.search(rf"^#     .*launch/{recipe} configs/\S+\.toml", (LAUNCH / recipe).read_text(), re.M)


def test_several_machines_are_refused_without_an_address(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        run(tmp_path, [str(LAUNCH / "nodes.sh"), "configs/demo.toml"], NODES="2")


def test_slurm_warns_the_script_which_stops_the_steps_and_queues_again(tmp_path, monkeypatch):
    asked = slurm_directives()
    assert asked["signal"] == "B:SIGUSR1@120" and "requeue" in asked and asked["ntasks-per-node"] == "1"
    script = """
import signal, time
{say}
os.kill(int(os.environ["SCRIPT"]), signal.SIGUSR1)
time.sleep(1)
sys.exit(1)
""".format(say=SAY.partition("\n")[2])
    monkeypatch.setitem(FAKES, "torchrun", "#!/usr/bin/env python3" + script)
    ours = f"SCRIPT=$$ exec bash {LAUNCH / 'slurm.sbatch'} configs/demo.toml"
    said = run(tmp_path, ["-c", ours], **of_slurm())
    assert [call[0] for call in said] == ["say", "torchrun", "scancel", "say"]
    assert said[2:] == [["scancel", "--signal=SIGUSR1", "7"], ["say", "requeue", "7"]]


def test_a_failed_job_of_slurm_is_not_queued_again(tmp_path, monkeypatch):
    monkeypatch.setitem(FAKES, "torchrun", "#!/bin/bash\nexit 3\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(tmp_path, [str(LAUNCH / "slurm.sbatch"), "configs/demo.toml"], **of_slurm())
    assert failed.value.returncode == 3


def test_the_pods_of_a_jobset_find_the_first_one_and_have_time_to_save():
    spec = jobset()
    (job,) = spec["spec"]["replicatedJobs"]
    name, pod = spec["metadata"]["name"], job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # JobSet names pods JOBSET-JOB-INDEX-POD, in a subdomain of the set's own name
    assert f"--rdzv-endpoint={name}-{job['name']}-0-0.{name}:29500" in container["command"]
    assert spec["spec"]["network"]["enableDNSHostnames"] and job["template"]["spec"]["completionMode"] == "Indexed"
    assert pod["terminationGracePeriodSeconds"] > 110
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_skypilot_keeps_the_run_on_the_bucket_and_goes_on_where_a_machine_goes():
    task = skypilot()
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    (mount,) = task["file_mounts"]
    assert f"out={mount}/" in task["run"] and task["envs"]["TRANSFUSION_CACHE"].startswith(mount)


@pytest.mark.parametrize("recipe", ["nodes.sh", "slurm.sbatch", "jobset.yaml", "skypilot.yaml"])
def test_ranks_of_several_machines_meet_anew_after_a_restart(recipe):
    text = (LAUNCH / recipe).read_text()
    assert re.search(r"export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1|name: TORCH_DISABLE_SHARE_RDZV_TCP_STORE", text)
