"""Ray's own adapter and reconciler, driven over the fake SLURM tools."""

from __future__ import annotations

import os
import time

import pytest
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.node_provider import LaunchNodeError, NodeProviderAdapter
from ray.core.generated.instance_manager_pb2 import NodeKind
from support import cluster_config, wait_for

from ray_slurm_provider import bootstrap
from ray_slurm_provider.node_provider import SlurmNodeProvider
from ray_slurm_provider.nodes import TAG_KIND, TAG_STATUS, TAG_TYPE
from ray_slurm_provider.ray_contract import prepare_config


@pytest.fixture
def config(tmp_path):
    eager = {"listing_interval_s": 1}
    return bootstrap.resolve(prepare_config(cluster_config("c", tmp_path / "state", slurm=eager)))


@pytest.fixture
def adapter(config, fake_slurm, monkeypatch):
    """Ray's v2 adapter around our provider, as in the autoscaler on a head."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "RAY_"))]:
        monkeypatch.delenv(name)
    for name in ("PATH", "FAKE_SLURM_DIR"):
        monkeypatch.setenv(name, fake_slurm.environ[name])
    head_config = config["available_node_types"]["head"]["node_config"]
    login = SlurmNodeProvider(config["provider"], "c")
    login.create_node(head_config, {TAG_KIND: "head", TAG_TYPE: "head", TAG_STATUS: "uninitialized"}, 1)
    (head_id,) = login.non_terminated_nodes({TAG_KIND: "head"})
    monkeypatch.setenv("RAY_CLOUD_INSTANCE_ID", head_id)
    monkeypatch.setenv("RAY_SLURM_GCS_ADDRESS", "1.2.3.4:5")

    class Reader:
        def get_cached_autoscaling_config(self):
            return AutoscalingConfig(config)

    adapter = NodeProviderAdapter(SlurmNodeProvider(config["provider"], "c"), Reader())
    adapter.head_id = head_id
    return adapter


def test_what_the_adapter_launches_it_lists_with_kind_type_and_request(adapter, fake_slurm):
    adapter.launch({"worker": 3}, "request-1")
    wait_for(lambda: len(fake_slurm.jobs()) == 4, 30, "three submissions")
    nodes = adapter.get_non_terminated()
    assert nodes[adapter.head_id].node_kind == NodeKind.HEAD
    workers = [node for node in nodes.values() if node.node_kind == NodeKind.WORKER]
    assert [(node.node_type, node.request_id, node.is_running) for node in workers] == [
        ("worker", "request-1", False)
    ] * 3
    assert len({node.cloud_instance_id for node in workers}) == 3


def test_what_the_adapter_terminates_is_cancelled_and_not_listed(adapter, fake_slurm):
    adapter.launch({"worker": 2}, "request-1")
    wait_for(lambda: len(fake_slurm.jobs()) == 3, 30, "two submissions")
    doomed = next(i for i in adapter.get_non_terminated() if i != adapter.head_id)
    adapter.terminate([doomed], "request-2")
    wait_for(lambda: any(job["state"] == "CANCELLED" for job in fake_slurm.jobs()), 30, "the cancellation")
    wait_for(lambda: doomed not in adapter.get_non_terminated(), 10, "the listing without it")
    assert adapter.poll_errors() == []


def test_a_refused_launch_becomes_an_error_with_slurms_words(adapter, fake_slurm):
    fake_slurm.faults(refuse="Invalid partition name specified")
    adapter.launch({"worker": 1}, "request-1")
    (error,) = wait_for(adapter.poll_errors, 30, "the error")
    assert isinstance(error, LaunchNodeError)
    assert error.__cause__.category == "slurm-partition"
    assert "Invalid partition name" in str(error.__cause__)


def test_a_controller_that_is_away_makes_the_listing_fail_and_not_shrink(adapter, fake_slurm):
    before = set(adapter.get_non_terminated())
    fake_slurm.faults(down=["squeue"])
    time.sleep(1.1)  # the provider shares a listing for one second
    with pytest.raises(Exception, match="Unable to contact"):
        adapter.get_non_terminated()
    fake_slurm.faults()
    time.sleep(1.1)  # and leaves a sick controller in peace for as long
    assert set(adapter.get_non_terminated()) == before


def test_the_scripts_of_workers_name_their_head(adapter, fake_slurm):
    adapter.launch({"worker": 1}, "request-1")
    wait_for(lambda: len(fake_slurm.jobs()) == 2, 30, "a submission")
    script = fake_slurm.script(2)
    assert f'"head": "{adapter.head_id}"' in script
    assert '"gcs_address": "1.2.3.4:5"' in script
