"""Our own responder for validations, and how a client tells it which names to answer for."""
