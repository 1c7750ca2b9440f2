"""The students and what compares them with their teachers."""
