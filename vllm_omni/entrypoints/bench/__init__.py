"""Load on a server, or on a loaded graph without one: what is asked, when, and how long the answers took.

`mix` what is asked · `load` when · `http_target`, `offline_target` who answers · `answer` one answer's times ·
`summary` all of them together. Knows nothing of what a stage computes.
"""
