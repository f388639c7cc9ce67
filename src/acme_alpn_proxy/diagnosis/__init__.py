"""C{check}: whether the proxy would work on this host."""
