"""What sbatch options promise, and what the allocation then has."""

from __future__ import annotations

import pytest

from ray_slurm_provider.agent.allocation import MIB, Allocation, gpu_count, read_allocation
from ray_slurm_provider.agent.ray_command import promised_resources
from ray_slurm_provider.agent.spec import AgentSpec
from ray_slurm_provider.errors import ConfigError
from ray_slurm_provider.ray_contract import accelerator_names
from ray_slurm_provider.resources import accelerator_name, derive, merge
from ray_slurm_provider.sbatch_options import SbatchOptions

GIB = 1024 * MIB


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"CPU": 1}),
        ({"cpus_per_task": 4}, {"CPU": 4}),
        ({"gres": "gpu:2"}, {"CPU": 1, "GPU": 2}),
        ({"gres": "gpu:a100:4,shard:1"}, {"CPU": 1, "GPU": 4, "accelerator_type:A100": 1}),
        ({"gpus_per_node": "h100:8"}, {"CPU": 1, "GPU": 8, "accelerator_type:H100": 1}),
        ({"gpus": 2, "cpus_per_gpu": 3}, {"CPU": 6, "GPU": 2}),
        ({"gres": "shard:1"}, {"CPU": 1}),
    ],
)
def test_cpus_and_gpus(options, wanted):
    assert derive(SbatchOptions(**options), accelerator_names()) == wanted


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"mem": "4G"}, 4 * GIB),
        ({"mem": 512}, 512 * MIB),
        ({"mem_per_cpu": "2G", "cpus_per_task": 3}, 6 * GIB),
        ({"mem_per_gpu": "8G", "gres": "gpu:2"}, 16 * GIB),
    ],
)
def test_memory_is_shared_between_the_object_store_and_the_rest(options, total):
    derived = derive(SbatchOptions(**options))
    assert derived["memory"] + derived["object_store_memory"] == total
    assert derived["object_store_memory"] == int(total * 0.3)


@pytest.mark.parametrize("options", [{}, {"mem": "0"}])
def test_memory_that_is_not_known_beforehand_is_not_promised(options):
    assert "memory" not in derive(SbatchOptions(**options))


@pytest.mark.parametrize(
    ("gres", "name"),
    [
        ("a100", "A100"),
        ("A100", "A100"),
        ("nvidia_a100_80gb_pcie", "A100"),
        ("tesla_v100", "V100"),
        ("mystery", "MYSTERY"),
        ("l40s", "L40S"),
    ],
)
def test_a_gres_type_gets_rays_name(gres, name):
    assert accelerator_name(gres, accelerator_names()) == name


def test_numbers_that_a_person_writes_win():
    options = SbatchOptions(cpus_per_task=4, mem="4G")
    merged = merge({"CPU": 0, "special": 2, "memory": 3 * GIB}, options, derive(options), "r")
    assert merged == {"CPU": 0, "special": 2, "memory": 3 * GIB, "object_store_memory": GIB}


def test_an_exclusive_node_may_have_more_than_was_asked_for():
    options = SbatchOptions(exclusive=True)
    assert merge({"CPU": 64}, options, derive(options), "r")["CPU"] == 64


@pytest.mark.parametrize(
    "written",
    [
        {"CPU": 5},
        {"GPU": 1},
        {"memory": 5 * GIB},
        {"memory": 3 * GIB, "object_store_memory": 2 * GIB},
        {"memory": 4 * GIB},
    ],
)
def test_a_contradiction_is_an_error(written):
    options = SbatchOptions(cpus_per_task=4, mem="4G")
    with pytest.raises(ConfigError):
        merge(written, options, derive(options), "r")


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0"}, 2),
        ({"SLURM_JOB_GPUS": "0-2,5"}, 4),
        ({"SLURM_JOB_ID": "1", "CUDA_VISIBLE_DEVICES": "GPU-8f2c,GPU-11aa"}, 2),
        ({"SLURM_JOB_ID": "1", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 0),
        ({}, 0),
    ],
)
def test_gpus_are_counted_by_slurms_variables(environ, count):
    assert gpu_count(environ) == count


@pytest.mark.parametrize(
    ("environ", "facts", "wanted"),
    [
        ({"SLURM_CPUS_ON_NODE": "2", "SLURM_MEM_PER_NODE": "2048"}, None, Allocation(2, 0, 2048)),
        ({"SLURM_CPUS_ON_NODE": "2", "SLURM_MEM_PER_CPU": "512"}, None, Allocation(2, 0, 1024)),
        ({"SLURM_CPUS_ON_NODE": "4"}, {"TRES": "cpu=4,mem=7.5G,node=1"}, Allocation(4, 0, 7680)),
    ],
)
def test_the_allocation_is_read_and_the_controller_asked_only_when_needed(environ, facts, wanted):
    def ask():
        assert facts is not None
        return facts

    assert read_allocation(environ, ask) == wanted


def test_without_tracked_memory_a_job_gets_its_share_of_the_host():
    assert (
        0
        < read_allocation({"SLURM_CPUS_ON_NODE": "1"}, dict).memory_mib
        <= read_allocation({"SLURM_CPUS_ON_NODE": "999"}, dict).memory_mib
    )


def _spec(resources, written=()):
    return AgentSpec("c", "d", "/x", head="1-a", resources=resources, written=list(written))


def test_a_node_tells_ray_what_its_allocation_has():
    allocated = Allocation(8, 2, 4096).resources()
    told = promised_resources(_spec({"CPU": 4, "GPU": 2, "accelerator_type:A100": 1}), allocated)
    assert told == {**allocated, "accelerator_type:A100": 1}


def test_a_node_keeps_what_a_person_wrote():
    allocated = Allocation(8, 0, 4096).resources()
    told = promised_resources(_spec({"CPU": 0, "memory": GIB, "x": 1}, ["CPU", "memory", "x"]), allocated)
    assert (told["CPU"], told["memory"], told["x"]) == (0, GIB, 1)
    assert told["memory"] + told["object_store_memory"] <= 4 * GIB


@pytest.mark.parametrize(("resources", "written"), [({"CPU": 9}, ["CPU"]), ({"GPU": 1}, ["GPU"]), ({"GPU": 1}, [])])
def test_a_node_that_has_less_than_promised_does_not_start(resources, written):
    with pytest.raises(ValueError):
        promised_resources(_spec(resources, written), Allocation(8, 0, 4096).resources())
