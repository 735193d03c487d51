"""What each stage trains on: its data, plan and starting weights."""
