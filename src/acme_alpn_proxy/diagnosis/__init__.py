"""C{check}: finds out whether the proxy would work on this host."""
