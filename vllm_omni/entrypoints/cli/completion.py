"""`vllm-omni completion`: a script that completes commands, options and names of configs in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

PROGRAM = "vllm-omni"
HELP = """\
bash:  source <(vllm-omni completion bash)          in ~/.bashrc
zsh:   source <(vllm-omni completion zsh)           in ~/.zshrc, behind compinit
fish:  vllm-omni completion fish | source           in ~/.config/fish/config.fish
"""
BASH = """\
_vllm_omni() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$current"))
    elif [ "$before" = "--config" ] || {{ [ "$COMP_CWORD" -eq 2 ] && [ "${{COMP_WORDS[1]}}" = "check" ]; }}; then
        COMPREPLY=($(compgen -W "{configs}" -- "$current") $(compgen -f -- "$current"))
    elif [[ "$current" == -* ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$current"))
    else
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}}
complete -o filenames -F _vllm_omni vllm-omni
"""
ZSH_HEAD = "autoload -U +X bashcompinit && bashcompinit\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `completion`."""
    parser.set_defaults(run=run)
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])
    parser.epilog, parser.formatter_class = HELP, argparse.RawDescriptionHelpFormatter


def run(args: argparse.Namespace) -> int:
    """Prints the script."""
    from vllm_omni.config.shipped import shipped_configs
    from vllm_omni.entrypoints.cli.app import build_parser

    options, configs = options_by_command(build_parser()), sorted(shipped_configs())
    if args.shell == "fish":
        print("\n".join(_fish_lines(options, configs)))
        return 0
    cases = "\n".join(f'        {command}) words="{" ".join(words)}" ;;' for command, words in options.items())
    script = BASH.format(cases=cases, commands=" ".join(options), configs=" ".join(configs))
    print((ZSH_HEAD if args.shell == "zsh" else "") + script, end="")
    return 0


def options_by_command(parser: argparse.ArgumentParser) -> dict[str, dict[str, str]]:
    """Command -> option -> its help."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {
        name: {
            option: (action.help or "").replace("%(default)s", str(action.default))
            for action in command._actions
            for option in action.option_strings
        }
        for name, command in commands.choices.items()
    }


def _fish_lines(options: Mapping[str, Mapping[str, str]], configs: Sequence[str]) -> list[str]:
    lines = [f"complete -c {PROGRAM} -n __fish_use_subcommand -f -a {command}" for command in options]
    for command, words in options.items():
        seen = f"-n '__fish_seen_subcommand_from {command}'"
        for option, words_of_help in words.items():
            form = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            names = f" -x -a '{' '.join(configs)}'" if option == "--config" else ""
            lines.append(f"complete -c {PROGRAM} {seen} {form}{names} -d {_quoted(words_of_help)}")
    return lines


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
