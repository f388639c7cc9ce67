"""Our own answer to a validation, and how a client says for which names it is to be given."""
