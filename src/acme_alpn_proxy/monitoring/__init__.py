"""What the proxy tells: status, metrics, log."""
