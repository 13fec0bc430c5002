"""The conversation behind `/v1/realtime`.

`session` the client's events · `conversation` what was said · `items` reading what the client says · `manner` how the
model is to answer · `answer` one response · `pcm` samples as that route has them.
"""
