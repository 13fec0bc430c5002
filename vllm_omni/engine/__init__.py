"""Stage engines: each turns tasks into payloads, one batch iteration a step."""
