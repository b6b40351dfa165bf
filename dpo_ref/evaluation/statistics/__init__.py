"""What samples and preferences are worth, and how sure one can be of it."""
