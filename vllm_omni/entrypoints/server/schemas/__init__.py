"""The bodies of requests, field by field. What no model can honour is not declared, and refused by its name."""
