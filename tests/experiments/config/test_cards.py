"""Configuration: every card lists the knobs of its class, and a misspelling fails before a model loads."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM

from experiments.config import command_line, compose
from experiments.config.compose import CONF, choices, expand, resolved, validate
from experiments.config.schema import RunConfig
from experiments.sinks.wandb import WandB
from kvmem.errors import ConfigError
from kvmem.merge.ropeshift import RopeShift
from kvmem.models import loading
from tests.helpers import warm_python

ROOT = CONF.parent
CLASS_GROUPS = ("backend", "hardware", "merge", "model", "scenario", "sink", "storage", "workload")
"""Each card of these groups names a class; the cards of the other groups set knobs of these."""
CARDS = sorted(path for group in CLASS_GROUPS for path in (CONF / group).glob("*.yaml"))
DATA_GROUPS = {"model", "hardware"}
"""Each card of these groups describes one model or machine, and may leave out what is not known."""
NOT_DEFAULT = {("storage", "pickle")}


def check(arguments: list[str]) -> None:
    compose.check(command_line.read(arguments))


def card_id(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@cache
def composed_with(path: Path) -> DictConfig:
    return compose.compose([f"{path.parent.name}={path.stem}"])


@pytest.mark.parametrize("path", CARDS, ids=card_id)
@pytest.mark.xdist_group("cards")
def test_a_card_matches_its_class(path: Path) -> None:
    card: dict[str, Any] = resolved(composed_with(path))[path.parent.name]
    cls = get_class(card["_target_"])
    knobs = {field.name for field in dataclasses.fields(cls) if field.init}
    made = instantiate(card, _convert_="all")
    assert type(made) is cls and cls.__pydantic_config__["extra"] == "forbid"
    if path.parent.name in DATA_GROUPS:
        assert card.keys() - {"_target_"} <= knobs
        return
    assert card.keys() - {"_target_"} == knobs
    if (path.parent.name, path.stem) not in NOT_DEFAULT:
        assert made == cls()


@pytest.mark.parametrize("path", CARDS, ids=card_id)
@pytest.mark.xdist_group("cards")
def test_every_card_composes_and_lists_its_own_class(path: Path) -> None:
    composed = composed_with(path)
    assert type(getattr(validate(composed), path.parent.name)) is get_class(composed[path.parent.name]["_target_"])


def test_the_default_run() -> None:
    config = validate(compose.compose([]))
    assert config.model.source() == config.backend.model_name_or_path == loading.PACKAGED
    assert (config.merge.name, config.template, config.separator) == ("Reprefill", "chat", "\n\n")
    assert config.sink == WandB()


def test_random_weights_reach_the_backend() -> None:
    config = validate(compose.compose(["model=qwen3_8b", "model.weights=random", "model.seed=5", "merge=ropeshift"]))
    assert (config.backend.model_name_or_path, config.backend.seed) == ("random:qwen3-8b", 5)
    assert isinstance(config.merge, RopeShift)


MISTAKES = {
    "moddel=tiny": "Unknown key 'moddel'. Did you mean model? Choices: backend, chat_template_kwargs, experiment",
    "moddel.name=x": "Unknown key 'moddel'. Did you mean model?",
    "+moddel=tiny": "Unknown key 'moddel'. Did you mean model?",
    "model=tinny": "Unknown choice model=tinny. Did you mean tiny? Choices: llama3_1_8b, ",
    "merge=ropshift": "Did you mean ropeshift? Choices: ",
    "experiment=hf_tft_table": "Did you mean hf_ttft_table?",
    "launcher=basik": "Did you mean basic?",
    "model.weigths=random": "Unknown key 'model.weigths'. Did you mean weights? Choices: label, name, seed, shape, ",
    "+model.foo=1": "model: unknown key 'foo'. Choices: label, name, seed, shape, weights.",
    "++sink.projekt=a": "sink: unknown key 'projekt'. Did you mean project?",
    "+sead=1": "Unknown key 'sead'. Did you mean seed?",
    "model.weights=radom": "model.weights: Input should be 'pretrained' or 'random' (got 'radom')",
    "model.shape=qwen3_8b": "Did you mean qwen3-8b?",
    "backend.dtype=float3": "backend: Unknown dtype 'float3'. Did you mean float32?",
    "backend.model_name_or_path=gpt2": "Set model.name and model.seed instead.",
    "storage.memory_filename=a.safetensor": "unknown suffix '.safetensor'. Did you mean .safetensors?",
    "storage.memory_filename=../a.safetensors": "memory_filename '../a.safetensors' is not a file below the folder",
    "template=chatt": "config.template: Input should be 'chat' or 'plain'",
    "seed=one": "config.seed: Input should be a valid integer",
    "scenario.pairs=0": "scenario.pairs: Input should be greater than or equal to 1",
    "sink.mode=ofline": "sink.mode: Input should be 'auto', 'offline', 'online' or 'disabled'",
    "merge._target_=kvmem.merge.Nothing": "merge: kvmem.merge.Nothing can't be made: ",
    "merge._target_=experiments.bench.setup.StorageCard": "merge",
    "model.label=${nope}": "model.label: Interpolation key 'nope' not found",
    "~model": "'model' is missing",
    "model": "Error parsing override 'model'",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_error(mistake: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check([mistake])
    assert MISTAKES[mistake] in str(raised.value)
    assert "Traceback" not in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_a_model_without_trained_weights() -> None:
    with pytest.raises(ConfigError, match="tiny is a shape without trained weights"):
        check(["model=tiny", "model.weights=pretrained"])


def test_a_sweep_is_checked_to_its_last_job() -> None:
    with pytest.raises(ConfigError, match=r"config.seed: .*got 'two'.*in the job model=smollm2_135m seed=two"):
        check(["--multirun", "model=smollm2_135m", "seed=1,two"])


def test_the_params_of_a_sweep_are_expanded_and_can_be_overridden() -> None:
    three = expand(["experiment=hf_ttft_table", "model.weights=random"])
    assert [validate(compose.compose(job)).model.label for job in three] == ["Qwen3-8B", "Qwen3-32B", "Qwen2.5-72B"]
    one = expand(["experiment=hf_ttft_table", "model=tiny"])
    assert [validate(compose.compose(job)).model.label for job in one] == ["tiny"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["modle=tiny"],
        ["-m", "model=tiny,tinny", "sink=none"],
        ["--cfg", "job", "model=tinny"],
        ["--help", "model=tinny"],
        ["--help", "modle=tiny"],
        ["--info", "all", "model=tinny"],
    ],
    ids=["job", "sweep", "shown", "help", "help of a key", "info"],
)
def test_the_command_ends_with_status_2_and_no_traceback(arguments: list[str], tmp_path: Path) -> None:
    done = warm_python.run(tmp_path, *arguments, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Unknown") and "Did you mean" in line
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["model=null"], ["-m", "sink=null", "seed=0,1"]], ids=["job", "sweep"])
def test_a_group_set_to_null_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"Got NoneType\. Give each group one of its choices, which --help lists"):
        check(arguments)


def test_help_lists_every_group_and_choice(tmp_path: Path) -> None:
    shown = warm_python.run(ROOT, "--help", env={"PYTHONPATH": str(ROOT)}).stdout
    for folder in (path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"):
        cards = sorted(path.stem for path in folder.glob("*.yaml"))
        assert f"{folder.name}: {', '.join(cards)}\n" in shown
    assert "hardware/gpu" not in shown and "mode/quick" not in shown


def test_a_layout_combines_its_gpus_data_sheet_and_their_number() -> None:
    h100 = yaml.safe_load((CONF / "hardware/gpu/h100.yaml").read_text())
    layout = resolved(compose.compose(["hardware=h100x4"]))["hardware"]
    assert h100.items() <= layout.items() and (layout["gpus"], layout["tensor_parallel"]) == (4, 4)
    assert not {"memory_gb", "peak_tflops"} & yaml.safe_load((CONF / "hardware/h100x4.yaml").read_text()).keys()
    assert "gpu" not in choices("hardware") and "h100x4" in choices("hardware")


def test_an_experiment_chooses_the_scenario_and_an_engine_does_not() -> None:
    alone, experiment = (resolved(compose.compose([one])) for one in ("backend=vllm", "experiment=vllm_prefix_reuse"))
    assert alone["scenario"]["_target_"].endswith(".KVvsDirect")
    assert alone | {"backend": None} == resolved(compose.compose([])) | {"backend": None}
    assert experiment["scenario"]["_target_"].endswith(".PrefixReuse") and experiment["backend"] == alone["backend"]


@pytest.mark.parametrize("workload", [path.stem for path in (CONF / "workload").glob("*.yaml")])
@pytest.mark.parametrize("scenario", [path.stem for path in (CONF / "scenario").glob("*.yaml")])
def test_every_scenario_and_workload_has_a_quick_and_a_debug_mode(scenario: str, workload: str) -> None:
    given = [f"scenario={scenario}", f"workload={workload}", "sink=wandb"]
    full, quick, debug = (resolved(compose.compose([*given, f"mode={mode}"])) for mode in ("full", "quick", "debug"))
    assert full == resolved(compose.compose(given))
    for cut in (quick, debug):
        validate(OmegaConf.create(cut))
        assert cut["sink"] == full["sink"], "a choice on the command line wins over the mode's"
    assert quick["workload"] != full["workload"]
    assert quick["scenario"] != full["scenario"] or scenario == "predict"
    assert debug["workload"]["max_cells"] == 1 and debug["tracebacks"]
    assert debug["model"]["shape"] == "tiny" and debug["model"]["weights"] == "random"


def test_a_mode_shortens_an_experiment_and_an_explicit_knob_wins() -> None:
    quick = resolved(compose.compose(["experiment=vllm_prefix_reuse", "mode=quick", "scenario.answer_tokens=6"]))
    assert (quick["scenario"]["pairs"], quick["scenario"]["answer_tokens"]) == (6, 6)
    assert quick["workload"]["context_tokens"] == [128] and quick["sink"]["_target_"].endswith(".NoSink")


PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen2.5-72b": 72_706_203_648,
    "llama-3.1-8b": 8_030_261_248,
    "smollm2-135m": 134_515_008,
}
"""The published parameter count of each model."""


@pytest.mark.parametrize("shape", PARAMETERS)
def test_shape_has_the_published_parameter_count(shape: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loading.shape_config(shape))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[shape]


def test_root_card_lists_every_knob_of_its_own() -> None:
    composed = compose.compose([])
    assert {str(key) for key in composed} - {"_target_"} == {field.name for field in dataclasses.fields(RunConfig)}
