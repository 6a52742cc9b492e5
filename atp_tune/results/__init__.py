"""What a study has found, read from its storage alone. No torch."""
