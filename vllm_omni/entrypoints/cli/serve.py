"""`vllm-omni serve`: one or several configs over HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_omni.entrypoints.cli.interrupts import interrupts_raise
from vllm_omni.errors import ConfigError
from vllm_omni.executor.process.keeper import SERVICE
from vllm_omni.utils.children.fork_client import prepare_children

if TYPE_CHECKING:
    from vllm_omni.entrypoints.server.settings import ServerSettings
    from vllm_omni.executor.pipeline import Pipeline

KEY_VARIABLE = "VLLM_OMNI_API_KEY"
DEFAULT_CONFIG = "tiny_omni"
# flag -> what `--help` says of it; the type and the default are the field's
NUMBERS = {
    "port": "0: any free one",
    "max_body_mb": "largest body of a request",
    "max_media_mb": "largest input that is fetched from a host",
    "max_connections": "at the same time; more get 503",
    "request_timeout_s": "deadline of a request, and the longest that one may ask for",
    "body_timeout_s": "longest that a client may keep its next bytes back",
    "write_timeout_s": "longest that a client may leave its answer unread",
    "drain_s": "after SIGTERM, how long what runs may take to end",
    "max_jobs": "jobs that are kept, finished ones included",
    "job_lifetime_s": "after which a finished job goes",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `serve`."""
    parser.set_defaults(run=run)
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="[NAME=]X",
        help=f"a stage config, and the name it is served under; may be repeated (default: {DEFAULT_CONFIG})",
    )
    parser.add_argument("--model", metavar="M", help="a checkpoint folder or hub id, instead of or with one config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a key of the config")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0: other machines may reach it (default: %(default)s)"
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"one key in each line; a single one may be in {KEY_VARIABLE}"
    )
    parser.add_argument("--no-auth", action="store_true", help="other machines need no key")
    parser.add_argument("--cors-origin", action="append", default=[], metavar="URL", help="browsers there may call it")
    parser.add_argument(
        "--allow-media-host",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="http(s) inputs may come from there; *.HOST: from what is below it",
    )
    parser.add_argument(
        "--files", type=Path, metavar="FOLDER", help="where finished jobs lie (default: a temporary one)"
    )
    parser.add_argument("--embed-prompt", action="store_true", help="files carry the prompt that made them")
    parser.add_argument("--otel", metavar="URL", help="OpenTelemetry spans go there (OTLP over HTTP)")
    parser.add_argument("--ui", action="store_true", help="the playground at /")
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="stages on the CPU run in the server's process, not in one of their own: less memory, slower beside HTTP",
    )
    parser.add_argument("--allow-restart", action="store_true", help="whoever has a key may restart stages")
    _add_numbers(parser)


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    from vllm_omni.entrypoints.server.settings import ServerSettings

    defaults = {field.name: field.default for field in dataclasses.fields(ServerSettings)}
    for name, words in NUMBERS.items():
        default = defaults[name]
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=type(default),
            default=default,
            metavar="N",
            help=f"{words} (default: %(default)g)",
        )


def run(args: argparse.Namespace) -> int:
    """Until it is told to end."""
    if not args.in_process:
        prepare_children([SERVICE])  # which takes as long to import as this process's own modules
    settings = settings_of(args)
    configs = served_configs(args.config, args.model, args.set, apart=not args.in_process)
    from vllm_omni.entrypoints.loading import prepare_stages

    prepare_stages(configs.values())
    try:
        from vllm_omni.entrypoints.server.models import ModelTable
        from vllm_omni.entrypoints.server.serving import serve
    except ImportError as error:
        raise ConfigError(f"serve: {error.name} is missing; pip install 'vllm-omni[server]'") from error
    with interrupts_raise():  # the server's end is its own
        serve(ModelTable(configs), settings)
    return 0


def settings_of(args: argparse.Namespace) -> ServerSettings:
    """ConfigError for values that cannot be."""
    from vllm_omni.entrypoints.server.settings import ServerSettings

    numbers: dict[str, Any] = {name: getattr(args, name) for name in NUMBERS}
    return ServerSettings(
        host=args.host,
        api_keys=tuple(read_keys(args.api_key_file)),
        no_auth=args.no_auth,
        cors_origins=tuple(args.cors_origin),
        media_hosts=tuple(args.allow_media_host),
        files=args.files,
        embed_prompt=args.embed_prompt,
        otel=args.otel,
        ui=args.ui,
        allow_restart=args.allow_restart,
        **numbers,
    )


def read_keys(file: Path | None) -> list[str]:
    """The keys of the file, else the one of the environment; lines that begin with # are none."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return [key] if key else []
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file: got {str(file)!r}, expected a text file ({error})") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file: {str(file)!r} holds no key; write one in each line")
    return keys


def served_configs(
    given: Sequence[str], model: str | None, overrides: Sequence[str], *, apart: bool = False
) -> dict[str, Pipeline]:
    """Name -> what is to be loaded; ConfigError where two have one name. apart: as of `open_pipeline`."""
    from vllm_omni.entrypoints.loading import open_pipeline

    if len(given) > 1 and (model is not None or overrides):
        flag = "--model" if model is not None else "--set"
        raise ConfigError(f"{flag}: got several --config, of which it could mean any; write it into theirs")
    found: dict[str, Pipeline] = {}
    for item in given or ["" if model is not None else DEFAULT_CONFIG]:
        name, equals, place = item.rpartition("=")
        pipeline = open_pipeline(place or None, model=model, overrides=overrides, apart=apart)
        name = name if equals else pipeline.config.name
        if not name or name in found:
            raise ConfigError(f"--config: got the name {name!r} twice, or an empty one; write NAME=PATH")
        found[name] = pipeline
    return found
