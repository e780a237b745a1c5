"""Where training runs: which GPUs, which hosts, and the processes on them."""
