"""The console script: its commands, and the daemon that they start and control."""
