"""Which rows the ports of a prompt hold where that is not one for each of its tokens: the first dropped, pads behind
the last. Refuses what a model or its tokenizer cannot do.
"""

from __future__ import annotations

from vllm_omni.engine.ar.options import AROptions
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.worker.ar.language_model import LanguageModelConfig


def describe_prompt_rows(options: AROptions) -> list[str]:
    """What `vllm-omni check` says of it."""
    said: list[str] = []
    if options.prompt_template is not None:
        said.append(f"prompts in prompt_template, the states of its first {options.num_dropped_tokens} tokens dropped")
    if options.prompt_template is not None and options.prompt_template.images is not None:
        said.append("the request's pictures before their words")
    if options.pad_prompt_to is not None:
        said.append(f"prompts padded to {options.pad_prompt_to} rows, pads have states")
    return said


def check_not_dropped(options: AROptions, num_tokens: int) -> None:
    """InvalidRequestError for a prompt of which no row would be left."""
    if num_tokens <= options.num_dropped_tokens:
        raise InvalidRequestError(
            f"prompt: got {num_tokens} tokens, expected more than the {options.num_dropped_tokens} that the stage "
            "drops (prompt_template.drop_tokens); token ids hold the template, too"
        )


def check_prompt_rows(options: AROptions, model: LanguageModelConfig, model_len: int, processor: TextProcessor) -> None:
    """ConfigError for a template that is shorter than what is dropped of it, and for pads that the model would see
    otherwise, or that the tokenizer does not have.
    """
    if options.prompt_template is not None and options.num_dropped_tokens:
        num_head = processor.num_tokens(options.prompt_template.head)
        if options.num_dropped_tokens > num_head:
            raise ConfigError(
                f"prompt_template.drop_tokens: got {options.num_dropped_tokens}, expected at most {num_head}, the "
                "template's tokens before the words"
            )
    if options.padded_len is not None:
        _check_length(options.padded_len, model, model_len)
        _check_pad_token(processor.pad_token_id, model.vocab_size)


def _check_length(length: int, model: LanguageModelConfig, model_len: int) -> None:
    """length: of a padded prompt, with what is dropped of it."""
    where = f"pad_prompt_to: got prompts of {length} tokens (those that are dropped included), expected at most"
    if length > model_len:
        raise ConfigError(f"{where} {model_len} (max_model_len); lower it")
    shortest = min((window for window in model.windows if window is not None), default=length)
    if length > shortest:
        raise ConfigError(f"{where} {shortest}, a window of the model, as pads see all of a prompt; lower it")
    if model.scaled_beyond is not None and length > model.scaled_beyond:
        raise ConfigError(
            f"{where} {model.scaled_beyond}, beyond which the model's positions depend on the length; lower it"
        )


def _check_pad_token(found: int | None, vocab_size: int) -> None:
    if found is None or not 0 <= found < vocab_size:
        raise ConfigError(
            f"pad_prompt_to: got the pad token {found} from the tokenizer, expected one below {vocab_size}, as many as "
            "the model knows; set `pad_token` in its tokenizer_config.json, or name another `tokenizer`"
        )
