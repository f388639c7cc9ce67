"""What this host says and does: processes, kernel facts, the PID file."""
