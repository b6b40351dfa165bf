"""What rows of preference data look like, and the groups they become."""
