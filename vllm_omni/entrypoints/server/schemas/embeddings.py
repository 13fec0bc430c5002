"""The body of `/v1/embeddings`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vllm_omni.entrypoints.server.schemas.base import MAX_TEXT, Body

TokenId = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
MAX_INPUTS = 2_048


class EmbeddingBody(Body):
    """As OpenAI's; `pooling` and `normalize` are our own."""

    input: (
        Text
        | Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="the first so many, for models trained to allow it")
    pooling: Literal["last", "mean"] = Field("last", description="which hidden states of the input stand for it")
    normalize: bool = Field(True, description="to length 1")

    @property
    def inputs(self) -> list[Any]:
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)
