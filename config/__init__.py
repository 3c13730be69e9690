"""Settings and logging: the only part of Tailrace that reads the environment."""
