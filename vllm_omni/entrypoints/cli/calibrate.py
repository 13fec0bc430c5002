"""`vllm-omni calibrate`: a few prompts with every step computed, and from them the numbers of a step cache that belong
to this model alone, written into its config.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_omni.entrypoints.cli.config_options import add_config_options
from vllm_omni.entrypoints.cli.console import say
from vllm_omni.entrypoints.cli.generate import prompt_texts
from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number, did_you_mean
from vllm_omni.utils.files import check_suffix, user_path, write_whole

if TYPE_CHECKING:
    from vllm_omni.core.diffusion.caches.recording import StepRecord
    from vllm_omni.entrypoints.calibration.fit import Fit
    from vllm_omni.executor.pipeline import Pipeline

PICTURES = (
    "a red circle left of a blue square",
    "a lighthouse at dusk, oil on canvas",
    "the face of an old sailor, close up, soft light",
    "a bowl of oranges on a wooden table",
)
SOUNDS = ("slow piano, melancholic", "fast drum and bass", "a folk song with acoustic guitar", "C4 then E4 then G4")
POLICIES = ("teacache", "magcache")
MAX_DEGREE = 9
PLOT_SUFFIXES = (".png",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `calibrate`."""
    parser.set_defaults(run=run)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file or the name of a shipped config")
    add_config_options(parser)
    parser.add_argument(
        "--stage", metavar="NAME", help="the dit stage whose step cache it is (where there are several)"
    )
    parser.add_argument("--policy", choices=POLICIES, help="the step cache (default: the config's own, else teacache)")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with one prompt in each line (default: four)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the config's)")
    parser.add_argument("--degree", type=int, default=4, help="of teacache's polynomial (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count on (default 0)")
    parser.add_argument("--plot", metavar="PNG", help="draw what was measured and what was fitted")
    written = parser.add_mutually_exclusive_group()
    written.add_argument(
        "--write", action="store_true", help="put the numbers into CONFIG, which stays as it is besides"
    )
    written.add_argument("-o", "--output", metavar="FILE", help="write a copy of CONFIG with the numbers")


def run(args: argparse.Namespace) -> int:
    """Prints the fit and the line for the config; writes what was asked for."""
    from vllm_omni.config.parsing import read_yaml
    from vllm_omni.config.shipped import find_config
    from vllm_omni.entrypoints.calibration.config_text import cache_line
    from vllm_omni.entrypoints.calibration.fit import fit

    source = find_config(args.config)
    target, plot = _target(args, source), _plot_path(args.plot)
    check_number("--degree", args.degree, 1, MAX_DEGREE, integer=True, raises=ConfigError)
    tree = read_yaml(source)
    stage = dit_stage(tree, args.stage)
    given = tree["stages"][stage].get("cache")
    given = given if isinstance(given, Mapping) else {}
    policy = args.policy or (given["policy"] if given.get("policy") in POLICIES else POLICIES[0])
    model, num_steps, records = record(args, stage, policy)
    fitted = fit(policy, records, num_steps, args.degree)
    own = {key: value for key, value in given.items() if given.get("policy") == policy}
    cache = {**own, "policy": policy, **fitted.keys, "fitted_on": model}
    say(f"{stage}: {policy}: {fitted.quality}")
    if plot is not None:
        _draw(fitted, f"{args.config} {stage}: {policy}", plot)
    if target is None:
        print(cache_line(cache))
    else:
        _write(source, target, stage, cache)
    return 0


def dit_stage(tree: Mapping[str, Any], name: str | None) -> str:
    """The stage that is meant, of the content of a config."""
    stages = tree.get("stages")
    found = [key for key, stage in stages.items() if stage.get("kind") == "dit"] if isinstance(stages, Mapping) else []
    if name is not None and name not in found:
        raise ConfigError(f"--stage: got {name!r}, expected a dit stage{did_you_mean(name, found)}")
    if name is None and len(found) != 1:
        which = f"found {', '.join(found)}; choose one with --stage" if found else "found none"
        raise ConfigError(f"stages: expected one dit stage, which has a step cache, {which}")
    return name or found[0]


def record(args: argparse.Namespace, stage: str, policy: str) -> tuple[str, int, Sequence[StepRecord]]:
    """(the model's fingerprint, the number of steps, what was recorded of all prompts)"""
    from vllm_omni.core.diffusion.caches.recording import Recording
    from vllm_omni.engine.diffusion.spec import DiffusionSpec
    from vllm_omni.entrypoints.loading import open_pipeline
    from vllm_omni.entrypoints.omni import Omni
    from vllm_omni.params import DiffusionParams

    signal = "modulated_input" if policy == "teacache" else "none"
    overrides = [*args.set, f"{stage}.cache={{policy: recording, signal: {signal}}}"]
    pipeline = open_pipeline(args.config, model=args.model, overrides=overrides)
    spec = pipeline.specs[stage]
    assert isinstance(spec, DiffusionSpec) and isinstance(spec.policy, Recording)
    prompts = prompt_texts((), args.prompts) if args.prompts else _default_prompts(pipeline, stage)
    params = [
        {stage: DiffusionParams(seed=args.seed + index, num_inference_steps=args.steps)}
        for index in range(len(prompts))
    ]
    with Omni(pipeline) as omni:
        outputs = omni.generate(prompts, params)
    for output in outputs:
        if output.error is not None:
            raise output.error
    num_steps = spec.model.num_steps(params[0][stage].with_defaults(spec.defaults))
    return spec.model.fingerprint(), num_steps, spec.policy.records


def _default_prompts(pipeline: Pipeline, stage: str) -> list[str]:
    return list(PICTURES if "image" in pipeline.specs[stage].signature.results else SOUNDS)


def _target(args: argparse.Namespace, source: Path) -> Path | None:
    """The file that is written, checked before the work; None where nothing is."""
    if args.output is not None:
        path = user_path("-o", args.output, raises=ConfigError)
        check_suffix(path, (".yaml", ".yml"))
        return path
    from vllm_omni.config.shipped import shipped_configs

    if args.write and source in shipped_configs().values():
        raise ConfigError(
            f"--write: {args.config} ships with the package and stays as it is; write a copy with -o FILE"
        )
    return source if args.write else None


def _plot_path(name: str | None) -> Path | None:
    if name is None:
        return None
    path = user_path("--plot", name, raises=ConfigError)
    check_suffix(path, PLOT_SUFFIXES)
    return path


def _draw(fitted: Fit, title: str, path: Path) -> None:
    from vllm_omni.utils.plots.fit_plot import draw_fit

    with _writing(path):
        draw_fit(fitted.points, fitted.line, fitted.axes, f"{title}\n{fitted.quality}", path)


def _write(source: Path, target: Path, stage: str, cache: Mapping[str, Any]) -> None:
    from vllm_omni.entrypoints.calibration.config_text import with_cache

    text = with_cache(source.read_text(encoding="utf-8"), stage, cache)
    with _writing(target):
        write_whole(target, text.encode())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
    say(f"wrote {path}")
