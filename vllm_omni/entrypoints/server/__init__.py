"""The OpenAI-compatible server. It holds an AsyncOmni for every model and knows nothing of what a stage computes.

`settings` what may be set · `models` what is served · `runs`, `jobs` requests on their way · `http` what is before the
routes · `routes` paths · `schemas` bodies · `requests` from a body to an OmniRequest · `answers` from outputs to a
body · `speaking`, `realtime` sound while it is said · `monitoring` · `app` all of it together · `serving` the process.
"""
