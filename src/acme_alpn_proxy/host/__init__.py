"""This host: processes, kernel facts, the PID file."""
