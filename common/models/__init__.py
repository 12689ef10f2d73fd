"""The models. They know nothing of federation except the names of their blocks."""
