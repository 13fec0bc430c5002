"""Stage configs: what a YAML and overrides mean, and that every mistake names file, key, got and expected."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.toy_stage import TOY_YAML, register_toys

from vllm_omni import registry
from vllm_omni.config import OmniConfig, SchedulerType
from vllm_omni.config.builder import build
from vllm_omni.config.document import STAGE_KEYS, TOP_LEVEL_KEYS, DType
from vllm_omni.config.loader import load_config
from vllm_omni.config.shipped import config_for_model, find_config, shipped_configs, supported_checkpoints
from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.utils.checks import number_complaint
from vllm_omni.utils.precision import DTYPES

SHIPPED = {
    "ace_step",
    "ace_step_planner",
    "diffusers",
    "flux2_klein",
    "language_model",
    "qwen3",
    "qwen3_embedding",
    "qwen3_omni",
    "qwen3_omni_text",
    "qwen3_tts",
    "qwen_image",
    "qwen_image_edit",
    "qwen_omni",
    "stable_audio",
    "tiny_audio",
    "tiny_image",
    "tiny_omni",
    "tiny_scene",
    "tiny_speech",
    "wan",
    "tiny_talker",
    "z_image",
}

register_toys()


@dataclass(frozen=True)
class Inner:
    count: int
    ratio: float = 0.5


@dataclass(frozen=True)
class Outer:
    choice: Literal["a", "b", 1]
    inner: Inner | None = None
    words: tuple[str, ...] = ()
    mixed: str | Inner | tuple[int, ...] = ""
    number: int | str | None = None
    table: Mapping[int, float] = dataclasses.field(default_factory=dict)


def toy(**changes: Any) -> dict[str, Any]:
    """A valid config whose top-level keys may be replaced."""
    return {"stages": {"source": {"kind": "echo"}}, "outputs": ["source"], **changes}


def one_stage(**keys: Any) -> dict[str, Any]:
    """A valid config whose only stage has these keys more."""
    return toy(stages={"source": {"kind": "echo", **keys}})


def complaint(config: Any, *overrides: str, model: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides, model)
    return str(caught.value)


def test_a_file_becomes_the_dataclasses(tmp_path: Path) -> None:
    path = tmp_path / "full.yaml"
    path.write_text(
        TOY_YAML
        + "model: a/b\nscheduler: {policy: priority, max_running: 3, request_timeout_s: 12, worker_timeout_s: 7.5}\n"
        + "resources: {max_memory_gb: 2, max_gpu_utilization: 0.5}\nlimits: {max_pixels: 99}\ndtype: float32\n"
        + "dit_cache: {prompt_embeds_mb: 0}\nprompts: {speech: 'say {input}!'}\n"
    )
    config = load_config(path, ["source.speaker=${model}/x", "loud.device=cpu"])
    assert (config.name, config.outputs, list(config.stages)) == ("toy", ("loud", "source.states"), ["source", "loud"])
    assert config.scheduler.policy is SchedulerType.PRIORITY
    assert (config.scheduler.max_running, config.scheduler.max_queue_size) == (3, 256)
    assert (config.request_timeout, config.worker_timeout) == (12.0, 7.5)
    assert (config.max_memory_gb, config.max_gpu_utilization) == (2.0, 0.5)
    assert type(config.max_memory_gb) is float
    assert (config.limits.max_pixels, config.dit_cache.prompt_embeds_mb) == (99, 0.0)
    assert config.prompts.for_speech("{input} twice") == "say {input} twice!"
    source, loud = config.stages["source"], config.stages["loud"]
    assert source.options.speaker == "a/b/x" and source.options.width == 4
    assert loud.inputs == {"text": "source.text", "states": "source.states"}
    assert (source.device, loud.device) == ("auto", "cpu")
    assert source.dtype == loud.dtype == "float32"


def test_unset_keys_have_the_defaults_of_the_schema() -> None:
    config, defaults = load_config(toy()), OmniConfig()
    for field in dataclasses.fields(OmniConfig):
        if field.name not in ("stages", "outputs"):
            assert getattr(config, field.name) == getattr(defaults, field.name)


def test_stage_options_nest_and_keep_their_types() -> None:
    taps = {"last": {"layers": [-2, 3], "tokens": "completion"}}
    options = load_config(one_stage(voice={"loudness": 3}, taps=taps, pair=[1, 2])).stages["source"].options
    assert options.voice.loudness == 3.0 and type(options.voice.loudness) is float
    assert options.taps["last"].layers == (-2, 3) and options.taps["last"].tokens == "completion"
    assert options.pair == (1, 2.0) and options.speaker is None


def test_a_mapping_is_read_like_a_file_and_stays_as_it_was() -> None:
    mapping = toy()
    before = json.dumps(mapping)
    config = load_config(mapping, ["source.width=8", "limits.max_outputs=2", "scheduler.policy=shortest_job_first"])
    assert config.stages["source"].options.width == 8 and config.limits.max_outputs == 2
    assert config.scheduler.policy is SchedulerType.SHORTEST_JOB_FIRST
    assert json.dumps(mapping) == before


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["stages", "nothing"]),
        (toy(stages={}), ["stages", "{}", "one or more"]),
        (toy(stages=[1]), ["stages", "[1]"]),
        ({"stages": {"source": {"kind": "echo"}}}, ["outputs: missing"]),
        (toy(outputs="source"), ["outputs: got 'source', expected a list"]),
        (toy(outputs=[1]), ["outputs[0]: got 1, expected a string"]),
        (toy(stagse={}), ["stagse: unknown key (did you mean 'stages'?)"]),
        (toy(max_memory_gb=3), ["max_memory_gb: unknown key"]),
        (toy(resources={"max_memory": 3}), ["resources.max_memory: unknown key (did you mean 'max_memory_gb'?)"]),
        (toy(resources={"max_memory_gb": "16"}), ["resources.max_memory_gb: got '16', expected a finite number"]),
        (toy(resources={"max_memory_gb": True}), ["resources.max_memory_gb: got True, expected a finite number"]),
        (toy(resources={"max_memory_gb": 0}), ["resources.max_memory_gb: got 0.0, expected more than 0"]),
        (toy(resources={"max_memory_gb": 10**400}), ["resources.max_memory_gb: got 1000", "a finite number"]),
        (toy(resources={"max_gpu_utilization": 1.5}), ["resources.max_gpu_utilization: got 1.5", "at most 1"]),
        (
            toy(resources=None),
            ["resources: got null, expected a group of keys (max_memory_gb, max_gpu_utilization, threads)"],
        ),
        (
            toy(scheduler={"policy": "fif0"}),
            ["scheduler.policy: got 'fif0'", "'fifo', 'priority'", "did you mean 'fifo'"],
        ),
        (toy(scheduler={"max_queue_size": 2.5}), ["scheduler.max_queue_size: got 2.5, expected an integer"]),
        (toy(scheduler={"max_queue_size": True}), ["scheduler.max_queue_size: got True, expected an integer"]),
        (toy(scheduler={"max_queue_size": 10**400}), ["scheduler.max_queue_size: got 1000"]),
        (toy(scheduler={"request_timeout": 3}), ["scheduler.request_timeout: unknown", "'request_timeout_s'"]),
        (toy(scheduler={"request_timeout_s": float("nan")}), ["scheduler.request_timeout_s: got nan"]),
        (toy(scheduler={"priority_weights": {"normal": "x"}}), ["scheduler.priority_weights.normal: got 'x'"]),
        (
            toy(scheduler={"priority_weights": {1: 1.0}}),
            ["scheduler.priority_weights.1 (the key): got 1, expected a str"],
        ),
        (toy(scheduler={"priority_weights": {"vip": 1.0}}), ["scheduler.priority_weights: 'normal' is missing"]),
        (toy(limits={"max_pixels": 0}), ["limits.max_pixels: got 0, expected at least 1"]),
        (toy(prompts={"speech": "read it out"}), ["prompts.speech: got 'read it out', expected a text with {input}"]),
        (toy(prompts={"speech": 3}), ["prompts.speech: got 3, expected a string"]),
        (toy(prompts={"speach": "{input}"}), ["prompts.speach: unknown key (did you mean 'speech'?)"]),
        (toy(dtype="fp32"), ["dtype: got 'fp32', expected one of 'auto', 'float32'"]),
        (toy(device="graphics card"), ["stages.source.device: got 'graphics card'"]),
        (toy(name=5), ["name: got 5, expected a string"]),
        (toy(model="a/b"), ["model: got 'a/b', which no stage uses", "${model}"]),
        (toy(stages={"source": {}}), ["stages.source.kind: missing; expected one of ", "echo"]),
        (toy(stages={"source": None}), ["stages.source: got null, expected a mapping"]),
        (toy(stages={"source": {"kind": "ecko"}}), ["stages.source.kind: got 'ecko'", "did you mean 'echo'"]),
        (toy(stages={"source": {"kind": ["echo"]}}), ["stages.source.kind: got ['echo']"]),
        (toy(stages={"a b": {"kind": "echo"}}), ["stages: got the name 'a b'"]),
        (toy(stages={1: {"kind": "echo"}}), ["stages: got the name 1"]),
        (toy(stages={"limits": {"kind": "echo"}}), ["stages.limits: the name is a top-level key"]),
        (one_stage(name="x"), ["stages.source.name: unknown key"]),
        (one_stage(options={}), ["stages.source.options: unknown key"]),
        (one_stage(widht=3), ["stages.source.widht: unknown key (did you mean 'width'?)"]),
        (one_stage(modle="x"), ["stages.source.modle: unknown key (did you mean 'model'?)"]),
        (one_stage(model=""), ["stages.source.model: got ''"]),
        (one_stage(model=3), ["stages.source.model: got 3, expected a string"]),
        (one_stage(executor="inlin"), ["stages.source.executor: got 'inlin'", "did you mean 'inline'"]),
        (one_stage(dtype="float8"), ["stages.source.dtype: got 'float8'"]),
        (one_stage(inputs=["a.b"]), ["stages.source.inputs: got ['a.b'], expected a mapping"]),
        (one_stage(inputs={"text": 3}), ["stages.source.inputs.text: got 3, expected a string"]),
        (one_stage(width=None), ["stages.source.width: got null, expected an integer"]),
        (one_stage(width="4"), ["stages.source.width: got '4', expected an integer"]),
        (one_stage(is_polite=1), ["stages.source.is_polite: got 1, expected true or false"]),
        (one_stage(voice="loud"), ["stages.source.voice: got 'loud', expected a group of keys (loudness, accent)"]),
        (one_stage(voice={"acent": 1}), ["stages.source.voice.acent: unknown key (did you mean 'accent'?)"]),
        (one_stage(voice={"accent": "northen"}), ["stages.source.voice.accent: got 'northen'", "mean 'northern'"]),
        (one_stage(voice={"loudness": 12}), ["stages.source.voice.loudness: got 12.0, expected at most 11"]),
        (one_stage(taps={"x": {}}), ["stages.source.taps.x.layers: missing"]),
        (one_stage(taps={"x": {"layers": [1, "a"]}}), ["stages.source.taps.x.layers[1]: got 'a', expected an integer"]),
        (one_stage(pair="ab"), ["stages.source.pair: got 'ab', expected a list"]),
        (one_stage(defaults={"seed": []}), ["stages.source.defaults.seed: got [], which has the wrong type"]),
        (one_stage(pair=[1]), ["stages.source.pair: got [1], expected a list of 2"]),
        (one_stage(defaults={"repaet": 1}), ["stages.source.defaults.repaet: unknown key (did you mean 'repeat'?)"]),
        (one_stage(defaults={"repeat": 12}), ["stages.source.defaults.repeat: got 12, expected 1 to 9"]),
        (one_stage(defaults={"repeat": "x"}), ["stages.source.defaults.repeat: got 'x'"]),
        (one_stage(speaker="${nobody}"), ["stages.source.speaker: ", "nobody"]),
        (one_stage(speaker="${oc.env:VLLM_OMNI_NO_SUCH_VARIABLE}"), ["stages.source.speaker: ", "NO_SUCH_VARIABLE"]),
        (one_stage(speaker="${model}/x"), ["stages.source.speaker: ", "model"]),
        (one_stage(speaker="${.speaker}"), ["stages.source.speaker: "]),
        (one_stage(speaker="???"), ["stages.source.speaker: "]),
        (one_stage(speaker="${"), ["stages.source.speaker: "]),
        (one_stage(speaker={1, 2}), ["stages.source.speaker: "]),
    ],
)
def test_every_mistake_names_its_key_what_it_got_and_what_was_expected(
    config: dict[Any, Any], words: list[str]
) -> None:
    message = complaint(config)
    for word in words:
        assert word in message
    assert message.startswith("config: ")
    assert "\n" not in message


def test_a_union_takes_what_fits_one_of_its_members() -> None:
    assert build(Outer, {"choice": "a", "mixed": "x"}).mixed == "x"
    assert build(Outer, {"choice": "a", "mixed": [1]}).mixed == (1,)
    assert build(Outer, {"choice": "a", "mixed": {"count": 2}}).mixed == Inner(2)
    assert type(build(Outer, {"choice": "a", "number": 3}).number) is int
    assert build(Outer, {"choice": "a", "number": "x"}).number == "x"
    for value in (3, [1, "x"], {"cuont": 1}, None):
        with pytest.raises(ConfigError, match=r"^mixed"):
            build(Outer, {"choice": "a", "mixed": value})
    with pytest.raises(ConfigError, match=r"^number: got \[\], expected an integer or a string or null$"):
        build(Outer, {"choice": "a", "number": []})
    with pytest.raises(ConfigError, match=r"^number: got True, expected an integer or a string or null$"):
        build(Outer, {"choice": "a", "number": True})


def test_an_annotation_that_no_yaml_can_fill_is_the_authors_mistake() -> None:
    @dataclass(frozen=True)
    class Odd:
        path: Path

    with pytest.raises(TypeError, match="cannot be filled from YAML"):
        build(Odd, {"path": "x"})


def test_a_null_model_is_no_model() -> None:
    assert "model" in complaint(toy(model=None, stages={"source": {"kind": "echo", "model": "${model}/text"}}))


def test_the_message_names_the_file_and_the_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TOY_YAML)
    message = complaint(path, "source.widht=3")
    assert message.startswith(f"{path} with source.widht=3: stages.source.widht: unknown key")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("source.width", ["'source.width'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("source..width=3", ["key=value"]),
        ("sorce.width=3", ["'sorce.width'", "did you mean 'source'"]),
        ("schedular.policy=fifo", ["did you mean 'scheduler'"]),
        ("stages.sorce.width=3", ["expected stages.<name>.<key>", "did you mean 'source'"]),
        ("stages={}", ["expected stages.<name>.<key>"]),
        ("source=3", ["expected stages.<name>.<key>"]),
        ("source.kind.x=3", ["stages.source.kind is 'echo', not a group of keys"]),
        ("source.voice.volume=3", ["stages.source.voice.volume: unknown key"]),
        ("source.width=[1", ["override 'source.width'", "line 1"]),
        ("source.width=four", ["stages.source.width: got 'four', expected an integer"]),
    ],
)
def test_a_wrong_override_is_an_error(override: str, words: list[str]) -> None:
    message = complaint(toy(), override)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("source.width=8", lambda c: c.stages["source"].options.width, 8),
        ("stages.source.width=8", lambda c: c.stages["source"].options.width, 8),
        ("source.voice.loudness=2", lambda c: c.stages["source"].options.voice.loudness, 2.0),
        ("source.voice={accent: northern}", lambda c: c.stages["source"].options.voice.accent, "northern"),
        ("source.voice={accent: northern}", lambda c: c.stages["source"].options.voice.loudness, 1.0),
        ("source.speaker=a=b", lambda c: c.stages["source"].options.speaker, "a=b"),
        ("source.speaker=null", lambda c: c.stages["source"].options.speaker, None),
        ("source.defaults.repeat=2", lambda c: c.stages["source"].defaults, {"repeat": 2}),
        ("source.defaults.repeat=null", lambda c: c.stages["source"].defaults, {}),
        ("source.speaker=${oc.env:OMNI_TEST_WHO,nobody}", lambda c: c.stages["source"].options.speaker, "nobody"),
        ("scheduler.worker_timeout_s=1e1", lambda c: c.worker_timeout, 10.0),
        ("device=cpu", lambda c: c.stages["source"].device, "cpu"),
        ("outputs=[source.states]", lambda c: c.outputs, ("source.states",)),
    ],
)
def test_an_override_replaces_what_the_file_says(override: str, read: Any, value: object) -> None:
    config = one_stage(voice={"loudness": 5}, speaker="ann", defaults={"repeat": 3})
    assert read(load_config(config, [override])) == value


def test_overrides_that_are_one_string_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"overrides: got the string 'name=x', expected a list"):
        load_config(toy(), "name=x")


def test_later_overrides_win() -> None:
    assert load_config(toy(), ["source.width=8", "source.width=9"]).stages["source"].options.width == 9


def test_a_stage_that_names_its_device_keeps_it() -> None:
    config = load_config(one_stage(device="cuda:1", dtype="bfloat16"), ["device=cpu", "dtype=float32"])
    assert (config.stages["source"].device, config.stages["source"].dtype) == ("cuda:1", "bfloat16")


def test_the_model_argument_replaces_the_files_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_stage(model="${model}/text_encoder") | {"model": "${oc.env:OMNI_TEST_MODEL,org/default}"}
    assert load_config(config).stages["source"].model == "org/default/text_encoder"
    monkeypatch.setenv("OMNI_TEST_MODEL", "org/env")
    assert load_config(config).model == "org/env"
    assert load_config(config, model="/here").stages["source"].model == "/here/text_encoder"
    assert "which no stage uses" in complaint(toy(), model="/here")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("name: a\nname: b\n", "duplicate key"),
        ("stages: {a: {kind: echo, kind: echo}}\noutputs: [a]\n", "duplicate key"),
        ("", "no mapping"),
        ("- 1\n", "no mapping"),
        ("just words\n", "no mapping"),
        ("a: [1\n", "line 2"),
        ("a: 1\n---\nb: 2\n", "document"),
        ("a: &x [*x]\n", "alias *x"),
        ("a: *nobody\n", "alias *nobody"),
        ("name: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("name: " + "9" * 5000 + "\n", "digits"),
        ("name: " + "[" * 50_000 + "\n", "levels"),
        ("name: [" + "1, " * 11_000 + "]\n", "values"),
        ("name: " + "x" * 1_000_001, "1000000 bytes"),
    ],
)
def test_a_damaged_or_outsized_file_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = complaint(path)
    assert word in message and message.startswith(str(path))
    assert len(message) < 1000


def test_an_alias_bomb_is_refused_before_it_is_expanded(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    assert "aliases written out" in complaint(path)


def test_a_chain_of_aliases_counts_its_depth(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 40)]
    path = tmp_path / "deep.yaml"
    path.write_text("\n".join(lines))
    assert "levels" in complaint(path)


def test_honest_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    path = tmp_path / "anchors.yaml"
    path.write_text(
        "stages:\n  one: &base {kind: echo, width: 6}\n  two: {<<: *base, speaker: ann}\noutputs: [one, two]\n"
    )
    stages = load_config(path).stages
    assert stages["one"].options.width == stages["two"].options.width == 6
    assert stages["two"].options.speaker == "ann"


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    assert "not UTF-8" in complaint(path)


def test_a_bare_name_is_a_path_first_and_a_shipped_config_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = shipped_configs()["tiny_image"]
    assert find_config("tiny_image.yaml") == find_config("tiny_image") == shipped
    Path("tiny_image").mkdir()
    assert find_config("tiny_image") == shipped
    Path("tiny_image.yaml").write_text(TOY_YAML)
    assert load_config("tiny_image.yaml").name == "toy"
    with pytest.raises(ConfigError, match=r"'tiny_imgae', which is no file .*did you mean 'tiny_image'"):
        load_config("tiny_imgae")
    with pytest.raises(ConfigError, match="no file"):
        load_config("")


def test_every_shipped_config_is_a_mapping_with_stages_and_known_keys() -> None:
    assert set(shipped_configs()) == SHIPPED
    for path in shipped_configs().values():
        tree = yaml.safe_load(path.read_text())
        assert set(tree) <= TOP_LEVEL_KEYS
        assert path.read_text().startswith("# ")


def test_every_shipped_config_and_example_loads() -> None:
    examples = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
    for path in [*shipped_configs().values(), *examples]:
        assert load_config(path).stages


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        ("model_index.json", {"_class_name": "ZImagePipeline"}, "z_image"),
        ("model_index.json", {"_class_name": "QwenImagePipeline"}, "qwen_image"),
        ("model_index.json", {"_class_name": "QwenImageEditPlusPipeline"}, "qwen_image_edit"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "diffusers"),
        ("model_index.json", {"_class_name": "Flux2KleinPipeline"}, "flux2_klein"),
        ("model_index.json", {"_class_name": "Flux2KleinKVPipeline"}, "flux2_klein"),
        ("model_index.json", {"_class_name": "Flux2KleinInpaintPipeline"}, "flux2_klein"),
        ("model_index.json", {"_class_name": "WanPipeline", "boundary_ratio": None}, "wan"),
        ("model_index.json", {"_class_name": "WanPipeline", "boundary_ratio": 0.875}, "diffusers"),
        ("config.json", {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "qwen3"),
        ("config.json", {"model_type": "qwen3"}, "qwen3"),
        ("config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "language_model"),
        ("config.json", {"model_type": "qwen2"}, "language_model"),
        ("config.json", {"architectures": ["MistralForCausalLM"]}, "language_model"),
        ("config.json", {"architectures": [], "model_type": "qwen3_moe"}, "language_model"),
        ("config.json", {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}, "language_model"),
        ("config.json", {"architectures": ["Own", "Qwen3VLForConditionalGeneration"]}, "language_model"),
        ("config.json", {"architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni"}, "qwen_omni"),
        ("config.json", {"architectures": ["Qwen2_5OmniForConditionalGeneration"]}, "qwen_omni"),
        ("config.json", {"model_type": "qwen2_5_omni"}, "qwen_omni"),
        ("config.json", {"architectures": ["Qwen3OmniMoeForConditionalGeneration"]}, "qwen3_omni"),
        ("config.json", {"model_type": "qwen3_omni_moe", "enable_audio_output": False}, "qwen3_omni_text"),
    ],
)
def test_a_checkpoint_finds_its_config(tmp_path: Path, file: str, content: Mapping[str, Any], name: str) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    assert config_for_model(tmp_path) == shipped_configs()[name]


@pytest.mark.parametrize(
    ("file", "content", "word"),
    [
        ("model_index.json", {"_class_name": ["ZImagePipeline"]}, "ZImagePipeline"),
        ("config.json", {"architectures": ["GemmaForCausalLM"], "model_type": "qwen3"}, "'GemmaForCausalLM'"),
        ("config.json", {"architectures": []}, "None"),
        ("other.json", {}, "neither model_index.json nor config.json"),
    ],
)
def test_an_unsupported_checkpoint_hears_what_is_supported(
    tmp_path: Path, file: str, content: Mapping[str, Any], word: str
) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"Qwen3ForCausalLM, .*ZImagePipeline") as caught:
        config_for_model(tmp_path)
    assert word in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_damaged_model_index_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        config_for_model(tmp_path)


def test_every_supported_checkpoint_is_registered_or_hosted() -> None:
    rows = {*registry.names("diffusion model"), *registry.names("language model")}
    known = {row.partition(".")[0] for row in rows}  # without the part of a checkpoint that holds several
    for name, config in supported_checkpoints().items():
        stages = yaml.safe_load(shipped_configs()[config].read_text())["stages"].values()
        assert name in known or "diffusers" in {stage["kind"] for stage in stages}, name


def test_the_words_of_the_config_agree_with_the_rest_of_the_package() -> None:
    assert set(DType.__args__) == {"auto", *DTYPES}
    assert {member.value for member in SchedulerType} == set(registry.names("scheduling policy"))
    assert "kind" in STAGE_KEYS and "options" not in STAGE_KEYS


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("abx_. ", max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abx_. ", max_size=6) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)
fields_of_outer = st.sampled_from(["choice", "inner", "words", "mixed", "table", "other"])


@given(st.dictionaries(fields_of_outer, plain_values | st.fixed_dictionaries({"count": st.integers()})))
def test_the_builder_either_builds_or_raises_a_config_error(values: dict[str, Any]) -> None:
    try:
        built = build(Outer, values, "top")
    except ConfigError as error:
        assert str(error).startswith("top")
        return
    assert type(built) is Outer and set(values) <= {f.name for f in dataclasses.fields(Outer)}
    assert built.choice in ("a", "b", 1) and type(built.choice) in (str, int)
    assert built.inner is None or (type(built.inner.count) is int and type(built.inner.ratio) is float)
    assert all(type(word) is str for word in built.words)
    assert all(type(key) is int and type(value) is float for key, value in built.table.items())


def test_an_integer_of_thousands_of_digits_is_a_complaint_and_no_crash() -> None:
    assert "too long to print" in str(number_complaint("x", 10**5000, 0, integer=True))
    assert "too long to print" in complaint(toy(name=10**5000))


@given(st.integers(min_value=10**308, max_value=10**400))
def test_an_integer_too_large_for_a_float_is_a_complaint_and_no_crash(value: int) -> None:
    assert (number_complaint("x", value, 0, integer=True) is None) == (value < 2**1024 - 2**970)


def test_no_deadline_is_the_default_and_can_be_written() -> None:
    for timeout, expected in ((None, float("inf")), (12, 12.0)):
        assert load_config(toy(scheduler={"request_timeout_s": timeout})).request_timeout == expected
    assert load_config(toy()).request_timeout == float("inf")
