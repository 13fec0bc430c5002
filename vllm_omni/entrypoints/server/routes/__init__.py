"""The paths of the server, one file for each kind. A route reads a body, builds a request and shapes an answer."""
