"""From the body of a request to an OmniRequest: what a graph can do, and where its inputs come from."""
