"""The console script: its commands, and the daemon behind them."""
