"""The layouts: every card is valid, and a machine that does not match is refused before a model loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from experiments.config.compose import compose, validate
from experiments.hardware.layout import CARDS, GPU, Hardware, Machine, commit, conditions, inspect, read_card
from kvmem.errors import ConfigError

CARD_FILES = sorted(CARDS.glob("*.yaml"))
LAPTOP = Machine("a laptop's processor", 8, 16.0, ())


def node(name: str, gpus: int) -> Machine:
    gpu = GPU(name, 80.0, "1.2", 1980, 2619, 40, 700.0)
    return Machine("a server's processor", 64, 1000.0, (gpu,) * gpus)


def card(name: str) -> Hardware:
    return read_card(CARDS / f"{name}.yaml")


@pytest.mark.parametrize("path", CARD_FILES, ids=lambda path: path.stem)
def test_every_card_is_named_after_its_file_and_is_what_hydra_composes(path: Path) -> None:
    hardware = read_card(path)
    assert hardware.name == path.stem
    assert hardware == validate(compose([f"hardware={path.stem}"])).hardware
    if hardware.gpu is None:
        assert hardware == Hardware()
    else:
        assert hardware.bandwidth_gb_s and hardware.memory_gb and hardware.peak_tflops["bfloat16"] > 0
        hardware.refuse(node(hardware.gpu, hardware.gpus // hardware.nodes))


def test_a_machine_that_is_not_the_layout_is_refused_with_a_remedy() -> None:
    for machine in (LAPTOP, node("NVIDIA H100 PCIe", 4), node("NVIDIA H100 80GB HBM3", 3)):
        with pytest.raises(ConfigError) as refused:
            card("h100x4").refuse(machine)
        assert "hardware=h100x4 is 4 × NVIDIA H100 80GB HBM3" in str(refused.value)
        assert str(machine) in str(refused.value)
        assert "hardware=local" in str(refused.value) and "hardware.check=false" in str(refused.value)


def test_too_little_host_memory_is_refused() -> None:
    hardware = Hardware(name="fat", gpu="NVIDIA H200", gpus=1, host_memory_gb=2000)
    with pytest.raises(ConfigError, match="2000 GB of memory"):
        hardware.refuse(node("NVIDIA H200", 1))


def test_more_gpus_than_the_layout_and_one_node_of_two_are_accepted() -> None:
    card("h100x2").refuse(node("NVIDIA H100 80GB HBM3", 8))
    card("4090x16").refuse(node("NVIDIA GeForce RTX 4090", 8))


def test_check_false_runs_on_any_machine() -> None:
    elsewhere = Hardware(name="elsewhere", gpu="no such GPU", gpus=1)
    with pytest.raises(ConfigError, match="no such GPU"):
        elsewhere.refuse_other_machines()
    elsewhere.check = False
    elsewhere.refuse_other_machines()
    Hardware().refuse_other_machines()


def test_parallelism_that_does_not_fill_the_layout_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"tensor_parallel 2 × pipeline_parallel 1 is not gpus 4"):
        Hardware(name="lame", gpu="NVIDIA H100", gpus=4, tensor_parallel=2)


def test_conditions_report_the_machine_and_all_that_a_figure_depends_on() -> None:
    machine = inspect()
    assert machine.cpu and machine.cores >= 1 and machine.memory_gb > 0.5
    reported = json.loads(json.dumps(conditions(), allow_nan=False))
    assert {"kvmem", "torch", "transformers", "python", "commit", "threads", "machine", "gpus"} <= reported.keys()
    assert len(reported["gpus"]) == len(machine.gpus)


def test_commit_is_that_of_this_checkout() -> None:
    if (CARDS.parents[1] / ".git").exists():
        found = commit()
        assert found is not None and len(found.rstrip("+")) == 12
    else:
        assert commit() is None
