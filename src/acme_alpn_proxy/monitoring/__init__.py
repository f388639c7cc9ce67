"""What operators can watch: status, metrics, log."""
