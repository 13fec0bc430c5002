"""HTTP and WebSockets themselves: who may speak, how bodies come in, how answers go out. Knows no model."""
