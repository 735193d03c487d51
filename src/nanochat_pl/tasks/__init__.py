"""What a chat model is trained and examined on: tasks that make conversations and judge answers."""
