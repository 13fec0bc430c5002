"""The OpenAI-compatible server. It holds an AsyncOmni for every model and knows nothing of what a stage computes.

`settings` what may be set · `models` what is served · `runs` requests on their way · `schemas` bodies · `routes`
paths · `gate` what is refused before a route sees it · `app` all of it together · `serving` the process.
"""
