"""How the package is used: Omni, AsyncOmni and the command line."""
