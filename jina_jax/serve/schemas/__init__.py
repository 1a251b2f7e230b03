"""What each vendor's clients send and expect."""
