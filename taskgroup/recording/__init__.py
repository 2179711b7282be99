"""Recording a training run: its files, and the trackers that show it while it trains."""
