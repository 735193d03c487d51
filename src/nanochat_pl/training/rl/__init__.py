"""Reinforcement learning: rollouts from the current weights, their rewards, and the weights of their tokens."""
