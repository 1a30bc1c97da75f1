"""The files of examples/production name options, metrics and files that exist. No container is started."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from kvmem.engines.vllm.connector.counts import COUNTER, METRICS
from kvmem.engines.vllm.server.serve import options_of

FOLDER = Path(__file__).parents[2] / "examples/production"
SHOWN = {name + "_total" if metric.kind == COUNTER else name for name, metric in METRICS.items()}


def commands() -> dict[str, list[str]]:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    documents = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    (deployment,) = [document for document in documents if document["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return {"compose": compose["services"]["server"]["command"], "kubernetes": container["args"]}


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_the_servers_options_are_known(where: str) -> None:
    options, for_vllm = options_of(commands()[where])
    assert (options.inject, options.store, for_vllm[0]) == ("auto", Path("/memories"), "--port")
    assert options.drain_s >= 60


def test_the_dashboard_and_the_page_show_the_connectors_metrics() -> None:
    dashboard = json.loads((FOLDER / "grafana/kvmem.json").read_text())
    drawn = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"kvmem:\w+", target["expr"])
    }
    assert drawn == SHOWN - {"kvmem:saved_tokens_total", "kvmem:learned_tokens_total"}
    page = (FOLDER.parents[1] / "docs/engines/production.md").read_text()
    assert set(re.findall(r"kvmem:\w+", page)) == SHOWN


def test_the_files_that_compose_mounts_are_there() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    mounted = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())]
    files = [path for path in mounted if path.startswith("./")]
    assert files and all((FOLDER / path).is_file() for path in files)
    assert (FOLDER / services["server"]["build"]["context"] / services["server"]["build"]["dockerfile"]).is_file()
