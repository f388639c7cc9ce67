"""The way of a visitor: first bytes, route, target, relay."""
