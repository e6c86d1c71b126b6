"""Rollouts: sampling, scoring, rewards, and the batches that PPO and GRPO learn from."""
